"""Train and test FuxiCTR 2.3.10 rankers through its public API; one JSON line for each.

    python benchmarks/peers/fuxictr_peer.py --jobs DeepFM:0.001:1:2024 ... --data TABLES/ml1m_ctr \
        --zoo CHECKOUT/model_zoo --work SCRATCH

A job is model:learning_rate:batch_norm:seed. All jobs share one preprocessing of the table.

The wheel holds the library only; the model classes live in the project's repository (`model_zoo/`), which --zoo names.
"""

import argparse
import importlib
import logging
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from fuxictr import __version__ as fuxictr_version
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from measure import BatchClock, Watch, emit

HIDDEN = [256, 128, 64]


def categorical(*names):
    return [{"name": list(names), "active": True, "dtype": "str", "type": "categorical"}]


TABLES = {
    "ml1m_ctr": [
        *categorical("user_id", "item_id", "gender", "age", "occupation", "zip_code", "year"),
        {
            "name": "genres",
            "active": True,
            "dtype": "str",
            "type": "sequence",
            "splitter": "^",
            "max_len": 6,
            "feature_encoder": "layers.MaskedAveragePooling()",
        },
    ],
    "globo_seq": categorical("item_id", "hour", "environment", "device", "os", "country", "region", "referrer"),
}
TABLES["globo_time"] = TABLES["globo_seq"]
AMAZON = ("amazon_beauty", "amazon_toys", "amazon_grocery")
TABLES |= {name: categorical("item_id", "category") for name in AMAZON}
# history -> the feature whose table it shares; a "." of a column's name is "_" here, as torch takes none in keys
HISTORIES = {
    "globo_seq": {"click_history": "item_id"},
    "globo_time": {"click_history_item": "item_id"},
    **{name: {"history_item": "item_id", "history_category": "category"} for name in AMAZON},
}


def history(name, table, *, attends, share=True):
    """Plain rankers pool the history; DIN attends over it, so its encoder is null."""
    return {
        "name": name,
        "active": True,
        "dtype": "str",
        "type": "sequence",
        "splitter": "^",
        "max_len": 20,
        "padding": "pre",
        "feature_encoder": None if attends else "layers.MaskedAveragePooling()",
        **({"share_embedding": HISTORIES[table][name]} if share else {}),
    }


def plain_names(source, folder):
    """The table's three files; copies in `folder` if a column's name has a dot."""
    files = {part: source / f"{part}.csv" for part in ("train", "valid", "test")}
    with files["train"].open() as file:
        header = file.readline()
    if "." not in header:
        return {part: str(path) for part, path in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path in files.values():
        with path.open() as old, (folder / path.name).open("w") as new:
            new.write(old.readline().replace(".", "_"))
            shutil.copyfileobj(old, new)
    return {part: str(folder / path.name) for part, path in files.items()}


MODELS = {
    "LR": ("LR", {}),
    "FM": ("FM", {}),
    "AutoInt": ("AutoInt", {"dnn_hidden_units": HIDDEN, "attention_layers": 2, "num_heads": 2, "attention_dim": 64}),
    "DeepFM": ("DeepFM/DeepFM_torch", {"hidden_units": HIDDEN}),
    "DCNv2": (
        "DCNv2",
        {
            "model_structure": "parallel",
            "use_low_rank_mixture": False,
            "num_cross_layers": 3,
            "parallel_dnn_hidden_units": HIDDEN,
            "stacked_dnn_hidden_units": HIDDEN,
        },
    ),
    "DLRM": ("DLRM", {"top_mlp_units": HIDDEN, "bottom_mlp_units": HIDDEN, "interaction_op": "dot"}),
    "FinalMLP": (
        "FinalMLP",
        {
            "mlp1_hidden_units": HIDDEN,
            "mlp2_hidden_units": HIDDEN,
            "use_fs": True,
            "fs_hidden_units": [64],
            "fs1_context": ["user_id"],
            "fs2_context": ["item_id"],
            "num_heads": 1,
        },
    ),
    # Layer norm is part of this one; there is no batch norm to choose.
    "MaskNet": ("MaskNet", {"dnn_hidden_units": HIDDEN, "model_type": "SerialMaskNet"}),
    "FinalNet": ("FinalNet", {"block_type": "2B", "block1_hidden_units": HIDDEN, "block2_hidden_units": HIDDEN}),
    "WuKong": (
        "WuKong",
        {"lcb_features": 16, "fmb_features": 16, "fmb_mlp_units": [128], "mlp_hidden_units": HIDDEN},
    ),
    "DIN": (
        "DIN",
        {
            "dnn_hidden_units": HIDDEN,
            "attention_hidden_units": [64],
            "attention_hidden_activations": "Dice",
            "din_use_softmax": False,
        },
    ),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-share", action="store_true", help="give histories their own tables")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING)
    jobs = [job.split(":") for job in args.jobs]
    attends = {model == "DIN" for model, *_ in jobs}
    assert len(attends) == 1, "DIN reads the history unpooled: run it apart from the others"
    table = args.data.name
    features = [dict(column) for column in TABLES[table]]
    histories = HISTORIES.get(table, {})
    features += [history(name, table, attends=attends == {True}, share=not args.no_share) for name in histories]
    files = plain_names(args.data, args.work / f"{table}_csv")
    din = {"din_target_field": list(histories.values()), "din_sequence_field": list(histories)}
    if len(histories) > 1:  # one attention over all fields of an event
        din = {key: [tuple(fields)] for key, fields in din.items()}
    dataset_id = f"{table}_{'din' if attends == {True} else 'flat'}"
    shutil.rmtree(args.work / dataset_id, ignore_errors=True)
    common = {
        "dataset_id": dataset_id,
        "data_root": str(args.work),
        "model_root": str(args.work / "checkpoints"),
        "data_format": "csv",
        "feature_cols": features,
        "label_col": {"name": "label", "dtype": "float"},
        "min_categr_count": 1,
        "train_data": files["train"],
        "valid_data": files["valid"],
        "test_data": files["test"],
        "loss": "binary_crossentropy",
        "metrics": ["logloss", "AUC"],
        "task": "binary_classification",
        "optimizer": "adam",
        "embedding_regularizer": 0,
        "net_regularizer": 0,
        "net_dropout": 0,
        "batch_size": args.batch,
        "embedding_dim": args.dim,
        "epochs": args.epochs,
        "shuffle": True,
        "monitor": "AUC",
        "monitor_mode": "max",
        "verbose": 0,
        "num_workers": 1,
        "early_stop_patience": 2,
        "save_best_only": True,
        "eval_steps": None,
        "group_id": None,
        "use_features": None,
        "feature_specs": None,
        "feature_config": None,
        "gpu": -1,
    }
    os.makedirs(Path(common["model_root"]) / dataset_id, exist_ok=True)
    with Watch() as watch:
        processor = FeatureProcessor(**common)
        common["train_data"], common["valid_data"], common["test_data"] = build_dataset(processor, **common)
        watch.lap("preprocess")
        loader = {**common, "data_format": "parquet"}
        for name, rate, batch_norm, seed in jobs:
            folder, extra = MODELS[name]
            norm = bool(int(batch_norm))
            params = {
                **common,
                "model": name,
                "model_id": name,
                "learning_rate": float(rate),
                "seed": int(seed),
                "batch_norm": norm,
                "mlp1_batch_norm": norm,
                "mlp2_batch_norm": norm,
                "mlp_batch_norm": norm,
                "regularizer": 0,
                **extra,
                **(din if name == "DIN" else {}),
            }
            if name in ("LR", "FM"):  # these two pass their `regularizer` on under both of the other names
                del params["embedding_regularizer"], params["net_regularizer"]
            seed_everything(params["seed"])
            feature_map = FeatureMap(dataset_id, str(args.work / dataset_id))
            feature_map.load(str(args.work / dataset_id / "feature_map.json"), params)
            train, valid = RankDataLoader(feature_map, stage="train", **{**loader, "seed": params["seed"]})
            package = str((args.zoo / folder).resolve())
            sys.path.insert(0, package)
            for module in [module for module in sys.modules if module == "src" or module.startswith("src.")]:
                del sys.modules[module]
            model = getattr(importlib.import_module("src"), name)(feature_map, **params)
            sys.path.remove(package)
            watch.lap("build")
            clock = BatchClock(train, args.batch)
            model.fit(clock, validation_data=valid, **params)
            watch.lap("fit_with_valid")
            checked = model.evaluate(valid)
            result = model.evaluate(RankDataLoader(feature_map, stage="test", **loader))
            watch.lap("test")
            emit(
                {
                    "peer": "fuxictr",
                    "version": fuxictr_version,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "table": table,
                    "model": name,
                    "batch": args.batch,
                    "dim": args.dim,
                    "epochs": args.epochs,
                    "share_embedding": not args.no_share,
                    "batch_norm": norm,
                    "learning_rate": float(rate),
                    "seed": int(seed),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "valid_auc": float(checked["AUC"]),
                    "test_auc": float(result["AUC"]),
                    "test_logloss": float(result["logloss"]),
                    **clock.report(),
                    **watch.marks,
                    "peak_rss_main_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "peak_pss_tree_mib": watch.peak_kib // 1024,
                    "wall_s": round(time.perf_counter() - watch.begin, 1),
                },
                args.json,
            )


if __name__ == "__main__":
    main()
