"""The docs site: `.ci/docs` builds it into build/docs."""

import importlib.metadata
import pkgutil
import re

import jax
from docutils import nodes
from latex2mathml.converter import convert

import qpenet_jax
from qpenet_jax.core import types

# Shapes read best as they are written: one Array, not JAX's or NumPy's at each place.
types.Array = jax.Array

project = "qpenet_jax"
author = "the qpenet_jax contributors"
release = importlib.metadata.version("qpenet-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
extensions += ["sphinx.ext.napoleon"]
templates_path = ["_templates"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"qpenet_jax {release}"
html_copy_source = False

# Pages are Markdown; the tutorial is one whose code is run on every build.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_math_renderer = "mathml"  # no script from elsewhere: formulas show offline as well
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# The reference: a page a room, made of all its modules and their docstrings, in which
# `x` is code. Types that aren't ours are no links.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
nitpick_ignore_regex = [(r"py:.*", r".*")]
found = pkgutil.walk_packages(qpenet_jax.__path__, "qpenet_jax.")
autosummary_context = {"packages": {module.name for module in found if module.ispkg}}


def setup(app):
    """Make signatures and docstrings read as they do in the code; draw formulas."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("autodoc-process-signature", _plain_signature)
    app.connect("autodoc-process-docstring", _whole_text, priority=100)
    app.connect("autodoc-skip-member", _skip_fields)


def _plain_signature(app, what, name, obj, options, signature, returned):
    """Take JAX's name for its arrays away, and Flax's own fields of networks."""
    plain = [
        text and text.replace("jaxlib._jax.", "") for text in (signature, returned)
    ]
    signature, returned = plain
    if signature:
        signature = re.sub(r"(, )?(\*, )?parent: .*(?=\))", "", signature)
        signature = signature.replace("<factory>", "...")
        signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", signature)
    return signature, returned


def _whole_text(app, what, name, obj, options, lines):
    """Keep Napoleon from reading a value's "what: why" as "type: text"."""
    if what in ("data", "attribute"):
        lines[:0] = ["..", ""]


def _skip_fields(app, what, name, obj, skip, options):
    """Leave fields of tuples out: the signature has them."""
    return True if str(obj.__doc__).startswith("Alias for field") else None


def _formula(writer, node):
    """Write a formula as MathML, which browsers draw by themselves."""
    text = re.sub(r"\\tag\{(\d+)\}", r"\\qquad\\qquad(\1)", node.astext())
    if isinstance(node, nodes.math_block):
        roomy = ' style="padding: 0.6em 0">'  # else Furo's box shows a scroll bar
        formula = convert(text, display="block").replace(">", roomy, 1)
    else:
        formula = convert(text)
    writer.body.append(formula)
    raise nodes.SkipNode
