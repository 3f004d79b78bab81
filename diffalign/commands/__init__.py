"""What the subcommands of `diffalign` do, one file each. Together with hub.py and app/ the only places that wire parts together.

Nothing here may import torch, diffusers or numpy at the top of a file: wrong arguments are answered before anything heavy loads.
"""
