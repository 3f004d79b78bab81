import sys
from pathlib import Path
import torch
torch.set_num_threads(2)
from diffalign.shapes.train import autoencoder
run=Path('runs/shapes')
m=autoencoder.train(run)
m.save_pretrained(run/'vae')
