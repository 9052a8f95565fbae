"""The BDH language model on the bytes of one text: trains a small causal model, then prints samples.

The default text is Python's help on its own topics (378 KB, differs a little between Python versions). Training starts
at 8 bits per byte (all 256 bytes equally likely); byte frequencies alone would give 4.7. Expected after 3 epochs, about
6 minutes on two CPU cores: 2.0 bits per byte on the held-out end of the text (one seed), and samples in which about
half of the words are real.

    python train_bdh_text.py
    python train_bdh_text.py --text book.txt --epochs 10 --residual true_pre

The authors' own size (25.3 million parameters) is for a GPU; the small batch of the validation bounds its memory:

    python train_bdh_text.py --n-layer 6 --n-embd 256 --n-head 4 --mlp-internal-dim-multiplier 128 \\
        --precision bf16 --eval-batch-size 8
"""

import torch

from training import Experiment, TextConfig, launch
from models.language import BDHConfig
from training.runs import load_model

EXPERIMENT = Experiment(
    "bdh_text",
    model=BDHConfig(
        n_layer=4,
        n_embd=128,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 512 neurons a head
        dropout=0.1,
        vocab_size=256,  # bytes
    ),
    train=TextConfig(
        text=None,  # pydoc_data.topics
        context=128,
        epochs=3,
        batch_size=8,  # 1,024 bytes a step, about 290 steps an epoch
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=100,
        val_fraction=0.1,
        test_fraction=0.1,
    ),
)

if __name__ == "__main__":
    run = launch(EXPERIMENT)
    model, _ = load_model(run)  # on the CPU
    torch.manual_seed(0)
    prompts = torch.tensor([[*b"The "]] * 3)  # three, each within the context: beyond it, sense is lost
    samples = model.generate(prompts, max_new_tokens=100).tolist()
    print("\nSamples from the best epoch:", *(bytes(each).decode(errors="replace") for each in samples), sep="\n\n> ")
