"""set_precision: which attention kernel a CPU takes, and that switching it changes no result."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.baselines import DeiTTinyConfig, ViTConfig
from models.vision_bdh import v2_softmax_config
from training.device import set_precision

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Operations(TorchDispatchMode):
    """Names of the operations inside, and the last two axes of the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.planes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        made = result if isinstance(result, tuple) else (result,)
        self.planes |= {tuple(each.shape[-2:]) for each in made if isinstance(each, torch.Tensor)}
        return result


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    set_precision("float32", CPU)


def logits(model, images, precision):
    with set_precision(precision, CPU), Operations() as seen:
        result = model(images)
        result.float().sum().backward()
    return result.detach().float(), seen


@pytest.mark.parametrize(
    "config",
    [ViTConfig(n_layer=2, n_embd=48, n_head=2, mlp_dim=64), DeiTTinyConfig(setting="fitted")],
    ids=["vit", "deit"],
)
def test_flash_attention_serves_few_tokens_in_float32_only(config):
    model, images = config.build(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.get_parameter("heads.head.weight" if isinstance(config, ViTConfig) else "head.weight"))
    expected, seen = logits(model, images, "float32")
    assert FLASH in seen.names
    result, seen = logits(model, images, "bf16")
    assert FLASH not in seen.names
    assert (result - expected).norm() < 0.05 * expected.norm()
    assert logits(model, images, "tf32")[0].equal(expected)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_softmax_over_many_tokens_holds_no_matrix_of_token_pairs(precision):
    config = v2_softmax_config(img_size=52, n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=2)  # N = D
    assert config.n_neurons == config.n_embd
    _, seen = logits(config.build(), torch.randn(2, 3, 52, 52), precision)
    assert (169, 16) in seen.planes
    assert (169, 169) not in seen.planes
