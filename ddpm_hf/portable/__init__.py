"""What is copied verbatim into every published repository: the scheduler, the pipelines and how they are saved.

The files import only torch, numpy, diffusers, transformers and each other, by `from .name_ddpm_hf import X`: Diffusers
lays remote code flat into one folder. A pipeline imports directly each of them that it needs: no others are copied.
"""
