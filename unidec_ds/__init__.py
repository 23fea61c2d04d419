"""UniDEC on DeepSpeed: a dual encoder and a one-vs-all classifier trained jointly.

Method: Kharbanda et al., "UniDEC: Unified Dual Encoder and Classifier Training for Extreme
Multi-Label Classification", arXiv 2405.03714. Start reading at `unidec_ds.trainer.train_step`.

    import unidec_ds
    unidec_ds.load("runs/quickstart").predict(["cut grass with a machine"], k=3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidec_ds.serving.predict import Label, Predictor, load

__version__ = "0.1.0"
__all__ = ["Label", "Predictor", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap: torch comes with the first use of these.
    if name in __all__:
        from unidec_ds.serving import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
