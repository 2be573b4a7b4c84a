"""Models and datasets that the tests' model pools name by `_target_`."""

import torch
from torch import nn


class Net(nn.Module):
    """Two layers and a head whose width is each task's own."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def net(seed: int, classes: int = 3) -> Net:
    torch.manual_seed(0)
    made = Net(classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * seed * torch.randn(p.shape, generator=generator)
    return made


class Vectors:
    """[40, 6] inputs with labels, sorted by label."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(40, 6, generator=generator) + torch.arange(40)[:, None] // 10

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], i // 10


class Texts:
    """Token ids of unequal lengths, with a label that no model should see."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(2, 64, (3 + i,), generator=generator).tolist() for i in range(6)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"input_ids": self.ids[i], "labels": 10_000, "idx": i}


class Images:
    """PIL images with labels."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, object]:
        from PIL import Image

        generator = torch.Generator().manual_seed(10 * self.seed + i)
        pixels = torch.randint(256, (20, 20, 3), generator=generator, dtype=torch.uint8)
        return {"image": Image.fromarray(pixels.numpy()), "label": i}


class Untouchable:
    """A dataset that must not be looked at."""

    def __len__(self) -> int:
        raise AssertionError("the dataset was used")
