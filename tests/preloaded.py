"""What every rank of `ranks.run_ranks` has imported when it is forked, and nothing else."""

import functools
import importlib

import cpuinfo

for name in (
    "accelerate",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler with it; every engine asks
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "unidec_ds.job",
):
    importlib.import_module(name)

# DeepSpeed asks for the CPU's flags twice a kernel, each time from an interpreter of its own that
# takes a second. They are the machine's.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
