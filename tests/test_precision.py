"""bf16: which attention a ViT takes on a CPU, empty shares of a batch, and models whose weights are bf16 themselves."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.baselines import FEW_TOKENS, ViTConfig
from models.rotary import RotaryAttention
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v4_config
from training.device import set_precision

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SIZES = dict(patch_size=8, n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)


class Operations(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def logits(model, images, precision):
    with set_precision(precision, CPU), Operations() as seen:
        result = model(images)
        result.float().sum().backward()
    return result.detach().float(), seen.names


def test_few_tokens_of_a_vit_attend_by_plain_products_in_bf16_only():
    sizes = dict(n_layer=2, n_embd=48, n_head=2, mlp_dim=64)
    model, images = ViTConfig(**sizes).build(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.heads.head.weight)
    expected, names = logits(model, images, "float32")
    assert FLASH in names
    result, names = logits(model, images, "bf16")
    assert FLASH not in names
    assert (result - expected).norm() < 0.05 * expected.norm()
    many = ViTConfig(**sizes, img_size=4 * 25).build()
    assert many.seq_length == 626 > FEW_TOKENS
    assert FLASH in logits(many, torch.randn(1, 3, 100, 100), "bf16")[1]


@pytest.mark.parametrize("make", [v1_config, v2_config, v2_softmax_config, v4_config])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_process_may_get_an_empty_share_of_a_batch(make, precision):
    model = make(**SIZES).build()
    with set_precision(precision, CPU):
        result = model(torch.randn(0, 3, 32, 32))
    assert result.shape == (0, 10)
    result.float().sum().backward()
    assert model.encoder.grad.eq(0).all()


@pytest.mark.parametrize("make", [v1_config, v2_config, v4_config])
@pytest.mark.parametrize("fast", [True, False])
def test_a_model_with_bf16_weights_keeps_the_precision_of_its_positions(make, fast):
    model, images = make(**SIZES, dropout=0.0).build(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.head.weight)
    expected = model(images)
    model.bfloat16().use_fast_path = fast
    (attention,) = (module for module in model.modules() if isinstance(module, RotaryAttention))
    assert model.encoder.dtype == torch.bfloat16 and attention.freqs.dtype == torch.float32
    assert attention.freqs.equal(make(**SIZES).build().attn.freqs)
    result = model(images.bfloat16())
    assert result.dtype == torch.bfloat16 and (result.float() - expected).norm() < 0.1 * expected.norm()
    assert model.double().attn.freqs.dtype == torch.float64
