"""train.py with what accelerate keeps for GPUs, on CPUs: FSDP2. For tests only.

accelerate calls several CPU processes MULTI_CPU and lets these be plain DDP. Here they pass for MULTI_GPU before the
Accelerator is made, which then heeds ACCELERATE_USE_FSDP and FSDP_*.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import PartialState
from accelerate.utils import DistributedType

import train
from utils.cli import parse_config, run_script
from utils.config import TrainConfig


def unlocked(**options: object) -> PartialState:
    state = PartialState(**options)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


train.PartialState = unlocked
run_script(train.main, parse_config(TrainConfig, train.__doc__))
