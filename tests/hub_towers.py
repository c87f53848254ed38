"""Builds a retriever on the image tower of `ann/clip`, saves and reloads it; see test_towers.py.

python tests/hub_towers.py FOLDER
"""

import sys
from pathlib import Path

import torch

from vptsp import VPTSPModel


built = VPTSPModel.from_backbone("ann/clip", embedding_dim=10, num_prompts=2)
folder = Path(sys.argv[1]) / "retriever"
built.save_pretrained(folder)
pixel_values = torch.randn(2, 3, 16, 16)
torch.testing.assert_close(VPTSPModel.from_pretrained(folder)(pixel_values).embeddings, built(pixel_values).embeddings)
