"""UniDEC on DeepSpeed: a dual encoder and a one-vs-all classifier trained jointly.

Method: Kharbanda et al., "UniDEC: Unified Dual Encoder and Classifier Training for Extreme
Multi-Label Classification", arXiv 2405.03714. Start reading at `unidec_ds.trainer.train_step`.
"""

__version__ = "0.1.0"
