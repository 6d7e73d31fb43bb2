"""The engine a config asks for."""

from importlib.util import find_spec

from workers.distill.config import DistillConfig
from workers.distill.engines.engine import Engine
from workers.distill.engines.optimizer import require_bitsandbytes
from workers.distill.student_loss import StudentLoss
from workers.errors import InputError
from workers.ranks import Ranks


def check_engine(config: DistillConfig, num_ranks: int | None) -> None:
    """Refuse, without loading a model, what the engine cannot do, and a file of DeepSpeed's that says otherwise.

    Args:
        num_ranks: None where it is not known yet.

    Raises:
        InputError: says what to leave out, or which engine can.
    """
    name, optimizer = config.engine.name, config.optimizer
    if optimizer.name != "adamw":
        require_bitsandbytes(optimizer)
    if name != "torch" and optimizer.name != "adamw":
        raise InputError(
            f"optimizer.name={optimizer.name} keeps its state in blocks that engine {name} would cut: choose adamw, "
            f"whose state {name} divides over the ranks, or --engine torch."
        )
    if name == "deepspeed" and optimizer.ema_decay is not None:
        raise InputError("optimizer.ema_decay: DeepSpeed keeps no average of the weights: choose --engine fsdp2.")
    if name == "deepspeed":
        from workers.distill.engines.deepspeed_config import deepspeed_config

        if find_spec("deepspeed") is None:
            raise InputError("DeepSpeed is not installed: pip install 'logit-cache[deepspeed]'.")
        settings = deepspeed_config(config, num_ranks=num_ranks, hidden_size=1)
        if config.peft is not None and config.peft.method == "dora" and settings["zero_optimization"]["stage"] == 3:
            raise InputError(
                "peft.method=dora: PEFT reads whole weights where ZeRO-3 holds shards: choose --zero-stage 2, --engine "
                "fsdp2, or lora."
            )


def open_engine(student: StudentLoss, config: DistillConfig, ranks: Ranks) -> Engine:
    """Wrap the student, moving it to the ranks' device or dividing it over them."""
    if config.engine.name == "fsdp2":
        from workers.distill.engines.fsdp2_engine import FSDP2Engine

        return FSDP2Engine(student, config, ranks)
    if config.engine.name == "deepspeed":
        from workers.distill.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(student, config, ranks)
    from workers.distill.engines.torch_engine import TorchEngine

    return TorchEngine(student, config, ranks)
