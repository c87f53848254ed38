"""With this package imported, the auto classes of transformers use its classes, and nothing is loaded for that."""

import subprocess
import sys

import pytest


ORDERS = {
    "the package": "import vptsp; assert not {'torch', 'transformers'} & set(sys.modules); "
    "from transformers import AutoModel",
    "transformers": "from transformers import AutoModel; import vptsp",
    "a class": "from vptsp import VPTSPConfig; from transformers import AutoModel",
    "a look": "import vptsp, importlib.util; importlib.util.find_spec('vptsp.configuration_vptsp'); "
    "importlib.util.find_spec('vptsp.modeling_vptsp'); import vptsp.configuration_vptsp; "
    "from transformers import AutoModel",
    "the loading": "import vptsp.loading_vptsp; from transformers import AutoModel",
    "a file": "import vptsp.backbones_vptsp; from transformers import AutoModel",
}
LOAD = """
config = AutoConfig.from_pretrained(sys.argv[1])
for options in ({}, {"trust_remote_code": True}):
    model = AutoModel.from_pretrained(sys.argv[1], **options)
    assert type(model) is vptsp.VPTSPModel and type(config) is type(model.config) is vptsp.VPTSPConfig
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""


@pytest.mark.parametrize("first", ORDERS)
def test_no_remote_code_is_asked_for_or_run(first, retriever_folder):
    code = f"import sys; {ORDERS[first]}; import vptsp; from transformers import AutoConfig{LOAD}"
    done = subprocess.run([sys.executable, "-c", code, retriever_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_the_package_it_is_asked_for(retriever_folder):
    code = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, retriever_folder], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr
