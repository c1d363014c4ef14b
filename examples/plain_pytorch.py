"""Fine-tune in plain PyTorch: the core of what finetune.py does, to read or to build upon.

    python examples/plain_pytorch.py DATA OUT

DATA holds images/ and masks/ (value = class index, 0 or 1 here) with the same names, all pictures of one size.
"""

import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from msa_unet import MSAUnet
from msa_unet.inference import prepare, to_unit_range

if len(sys.argv) != 3:
    raise SystemExit(__doc__)
data, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
model = MSAUnet.from_pretrained("tf_efficientnet_lite0.dsb2018", class_names=["background", "lesion"])
model.freeze_encoder(stages=2).train()  # the fine stages are edges and textures, good for any picture
optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3, encoder_lr_scale=0.3))

paths = sorted((data / "images").iterdir())
images = torch.cat([prepare(to_unit_range(Image.open(path)), model.config) for path in paths])  # (N, 3, H, W)
masks = torch.stack([torch.from_numpy(np.array(Image.open(data / "masks" / path.name))).long() for path in paths])
for epoch in range(1, 6):
    for batch in torch.randperm(len(images)).split(4):
        levels = model.forward_levels(images[batch])  # what each depth votes, coarse to fine
        *coarser, logits = accumulate(levels)  # the sum of all is model(images[batch])
        loss = F.cross_entropy(logits, masks[batch])
        # deep supervision, to show how: it gained nothing where it was measured (docs/design.md)
        loss = loss + sum(F.cross_entropy(z, masks[batch]) for z in coarser) / len(coarser)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
model.save_pretrained(out)
