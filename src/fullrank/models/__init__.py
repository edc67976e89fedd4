"""Rankers, one file per architecture."""

from fullrank.models.autoint import AutoInt
from fullrank.models.base import ParameterCount, Ranker, RankerOutput
from fullrank.models.bst import BST
from fullrank.models.cetnet import CETNet, MultiEmbedding
from fullrank.models.dcn_v2 import DCNv2
from fullrank.models.deepfm import DeepFM
from fullrank.models.dhen import DHEN
from fullrank.models.dien import DIEN
from fullrank.models.din import DIN
from fullrank.models.dlrm import DLRM
from fullrank.models.finalmlp import FinalMLP
from fullrank.models.fm import FM
from fullrank.models.hilomoe import HiLoMoE
from fullrank.models.interformer import InterFormer
from fullrank.models.kunlun import Kunlun
from fullrank.models.lr import LR
from fullrank.models.mmoe import MMoE
from fullrank.models.ple import PLE
from fullrank.models.transact import TransAct
from fullrank.models.wukong import Wukong

MODELS: dict[str, type[Ranker]] = {
    model.name: model
    for model in (
        LR,
        FM,
        DeepFM,
        DCNv2,
        DLRM,
        AutoInt,
        FinalMLP,
        DIN,
        BST,
        DIEN,
        TransAct,
        MMoE,
        PLE,
        CETNet,
        MultiEmbedding,
        Wukong,
        DHEN,
        HiLoMoE,
        InterFormer,
        Kunlun,
    )
}

__all__ = ["MODELS", "ParameterCount", "Ranker", "RankerOutput", *sorted(model.__name__ for model in MODELS.values())]
