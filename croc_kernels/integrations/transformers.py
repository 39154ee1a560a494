r"""transformers: ``attn_implementation="croc"`` for any model, and the Croc stage for its image
models.

::

    from croc_kernels.integrations import transformers as croc

    croc.register()                                   # once per process
    model = AutoModel.from_pretrained(name, attn_implementation={"text_config": "croc"})

    layer = croc.attach(model, recipe="croc")         # pretrain; model.croc has the pool and the
    head print("\n".join(croc.report(model))) croc.detach(model)

Importing this module changes nothing; :func:`register` adds two entries to transformers'
registries, and :func:`attach` (which calls it) changes the instance it is given.
"""

from .attach import attach, detach, report
from .attention_interface import is_registered, register
from .export import export
from .faults import known_faults
from .saving import from_pretrained

__all__ = [
    "attach",
    "detach",
    "export",
    "from_pretrained",
    "is_registered",
    "known_faults",
    "register",
    "report",
]
