"""Official StyleGAN2-ADA (PyTorch) checkpoints, read without executing anything in them.

isolation.py  the process that reads a file, within limits of time and memory
foreign.py    what a file is that is no checkpoint
pickled.py    a pickle as data: plain values and records of what it wanted to be called
source.py     a static look at the embedded Python source
persisted.py  the records as persisted objects and arrays
stored.py     what the process hands back: JSON and safetensors
convert.py    `read_official`: configuration, cross-checks, networks
"""
