"""Public functions and classes have types and docstrings, and type checkers see them from outside."""

import inspect

import pytest

import ddpm_hf
from ddpm_hf import data, models, objectives
from ddpm_hf.evaluation import bound, coding, likelihood


def public_names():
    """What users import: name -> object."""
    found = {f"ddpm_hf.{name}": getattr(ddpm_hf, name) for name in ddpm_hf.__all__}
    for module in (objectives, likelihood, bound, coding):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if not name.startswith("_") and getattr(value, "__module__", "").startswith(module.__name__):
                found[f"{module.__name__}.{name}"] = value
    found["ddpm_hf.models.build_unet"] = models.build_unet
    found |= {
        f"ddpm_hf.data.{name}": getattr(data, name) for name in ("embedded_digits", "ImageTransform", "image_grid")
    }
    return found


def callables():
    """Every public function, and every public method that our classes define."""
    found = {}
    for name, value in public_names().items():
        if inspect.isfunction(value):
            found[name] = value
        elif inspect.isclass(value):
            generated = issubclass(value, tuple)  # a NamedTuple's own methods have no types
            for base in value.__mro__:
                for method, body in vars(base).items():
                    body = getattr(body, "__func__", getattr(body, "fget", body))
                    ours = inspect.isfunction(body) and body.__module__.startswith("ddpm_hf")
                    public = not method.startswith("_") or method in ("__init__", "__call__")
                    if ours and public and not (generated and method == "__init__"):
                        found.setdefault(f"{name}.{method}", body)
    return found


CALLABLES = callables()


def test_the_public_names_are_looked_at():
    # Breaks if the tests below look at nothing.
    assert {
        "ddpm_hf.load",
        "ddpm_hf.training_losses",
        "ddpm_hf.DDPMPipeline.__call__",
        "ddpm_hf.DDPMPipeline.from_pretrained",
        "ddpm_hf.DDPMScheduler.add_noise",
        "ddpm_hf.objectives.vb_terms_bpd",
        "ddpm_hf.data.ImageTransform.resize",
        "ddpm_hf.models.build_unet",
    } <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_every_parameter_has_a_type_and_every_function_a_docstring(name):
    # Breaks if an editor can say nothing of an argument, or of what comes back.
    function = inspect.unwrap(CALLABLES[name])
    signature = inspect.signature(function)
    untyped = [
        one.name
        for one in signature.parameters.values()
        if one.annotation is one.empty and one.name not in ("self", "cls")
    ]
    assert not untyped, f"{name}: {', '.join(untyped)} without a type"
    if not name.endswith(".__init__"):
        assert signature.return_annotation is not signature.empty or isinstance(CALLABLES[name], property), name
        assert (inspect.getdoc(function) or "").strip(), f"{name} has no docstring"
