"""What every rank of `ranks.run_ranks` has imported when it is forked, and nothing else."""

import importlib

import cpuinfo

from unidec_ds.extensions import remember_cpu_flags

for name in (
    "accelerate",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler with it; every engine asks
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "unidec_ds.job",
):
    importlib.import_module(name)

# The flags are the machine's, so one process can ask for all ranks.
remember_cpu_flags()
cpuinfo.get_cpu_info()
