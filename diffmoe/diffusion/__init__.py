"""Diffusion: two processes behind one interface (`process`), their integrators and guidance."""

from diffmoe.config import DiffusionConfig, ProcessKind
from diffmoe.diffusion.ddpm import DDPM
from diffmoe.diffusion.flow import RectifiedFlow
from diffmoe.diffusion.guidance import guided
from diffmoe.diffusion.process import Predict, Process

__all__ = ["Predict", "Process", "build_process", "guided"]


def build_process(config: DiffusionConfig) -> Process:
    """Build the process that `config` names."""
    return {ProcessKind.FLOW: RectifiedFlow, ProcessKind.DDPM: DDPM}[config.process]()
