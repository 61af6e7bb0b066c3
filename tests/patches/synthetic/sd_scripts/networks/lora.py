"""A toy model with a linear layer and a convolution, and LoRA modules that hide their frozen layer
as kohya's do."""

import torch
from safetensors.torch import save_file


class ToyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.text = torch.nn.Linear(8, 8)
            self.unet_linear = torch.nn.Linear(8, 16)
            self.unet_conv = torch.nn.Conv2d(1, 4, 3, padding=1)
            self.target = torch.randn(4, 4, 4, 4)
        self.requires_grad_(False)

    def loss(self, batch):
        hidden = self.unet_linear(torch.tanh(self.text(batch)))
        return (self.unet_conv(hidden.view(-1, 1, 4, 4)) - self.target).pow(2).mean()


class Module(torch.nn.Module):
    def __init__(self, name, frozen, rank, alpha):
        super().__init__()
        self.lora_name, self.scale = name, alpha / rank
        if isinstance(frozen, torch.nn.Conv2d):
            self.lora_down = torch.nn.Conv2d(
                frozen.in_channels, rank, frozen.kernel_size, padding=frozen.padding, bias=False
            )
            self.lora_up = torch.nn.Conv2d(rank, frozen.out_channels, 1, bias=False)
        else:
            self.lora_down = torch.nn.Linear(frozen.in_features, rank, bias=False)
            self.lora_up = torch.nn.Linear(rank, frozen.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.org_module = frozen

    def apply_to(self):
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.scale


class Network(torch.nn.Module):
    def __init__(self, model, rank, alpha):
        super().__init__()
        parts = [
            ("lora_te_text", model.text),
            ("lora_unet_linear", model.unet_linear),
            ("lora_unet_conv", model.unet_conv),
        ]
        modules = [Module(name, frozen, rank, alpha) for name, frozen in parts]
        self.text_encoder_loras, self.unet_loras = modules[:1], modules[1:]

    def apply_to(self, model, train_text=True):
        if not train_text:
            self.text_encoder_loras = []
        for module in self.text_encoder_loras + self.unet_loras:
            module.apply_to()
            self.add_module(module.lora_name, module)

    def save_weights(self, file, dtype, metadata):
        save_file({name: tensor.clone() for name, tensor in self.state_dict().items()}, file, metadata)
