"""Fit a linear click model by sub-sampled Newton, give it to a ranker, and serve the ranker from a bundle.

python examples/linear_ranker_by_newton.py [IMPRESSIONS]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp
import torch

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import SimulationConfig, simulate, simulation_schema
from fullrank.funnel import Scorer, load_bundle, save_bundle
from fullrank.metrics import normalized_entropy
from fullrank.models import MODELS
from fullrank.randomized import SubsampledNewtonClassifier

impressions = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000

# Features that an ad of tomorrow shares with those of today: no single users, no single ads, no histories.
schema = simulation_schema()
known = [f for f in schema.features if f.name not in ("user_id", "item_id", "history")]
schema = schema.model_copy(update={"features": tuple(known), "labels": schema.labels[:1]})
log = pl.concat(simulate(SimulationConfig(impressions=impressions, seed=1)))
train, test = log[: int(0.8 * len(log))], log[int(0.8 * len(log)) :]
encoders = Encoders.fit(schema, [train])
schema = encoders.schema  # now it knows the sizes of the tables

model = MODELS["lr"].from_config(schema, {"embedding_init": 0.0})
term = model.terms[0]
# All tables lie behind one another, one number for each id.
first_row = {table: places[0].rows.start for table, places in term.weights.layout.places.items()}


def design(batch: Batch) -> sp.csr_array:
    """One column for each row of the ranker's tables, then one for each number."""
    ids_BF = batch.ids_BF.numpy() + np.array([first_row[feature.table_name] for feature in schema.categorical])
    size = term.weights.buffers_[0].weight_RD.shape[0]
    indptr = np.arange(0, ids_BF.size + 1, ids_BF.shape[1])
    one_hot = sp.csr_array((np.ones(ids_BF.size), ids_BF.ravel(), indptr), shape=(len(batch), size))
    return sp.csr_array(sp.hstack([one_hot, batch.numeric_BN.numpy().astype(float)]))


batch = batch_from_frame(encoders.transform(train), schema)
X, clicked = design(batch), batch.labels_BT[:, 0].numpy()
begin = time.process_time()
newton = SubsampledNewtonClassifier(C=1.0, random_state=0).fit(X, clicked)
seconds = time.process_time() - begin
print(f"{X.shape[0]:,} rows x {X.shape[1]} columns, {newton.n_passes_} passes, {seconds:.2f} CPU-s")

tables = X.shape[1] - batch.numeric_BN.shape[1]
with torch.no_grad():
    weights = torch.from_numpy(newton.coef_[0]).float()
    term.weights.buffers_[0].weight_RD.copy_(weights[:tables, None])
    term.numeric_N.copy_(weights[tables:])
    term.bias.copy_(torch.tensor(newton.intercept_[0]))

with tempfile.TemporaryDirectory() as folder:
    save_bundle(Scorer(encoders, model), Path(folder) / "bundle", about={"fitted by": "sub-sampled Newton"})
    served = load_bundle(Path(folder) / "bundle")

rows = test.select([name for name in test.columns if name in served.columns]).to_dicts()
scored = served.score(rows)
probability = torch.tensor([item.predictions["click"] for item in scored]).double()
expected = newton.predict_proba(design(batch_from_frame(encoders.transform(test), schema)))[:, 1]
print(f"test NE {normalized_entropy(torch.logit(probability), torch.tensor(test['click'].to_numpy())):.4f}", end=", ")
print(f"bundle and estimator differ by {np.abs(probability.numpy() - expected).max():.1e}")
