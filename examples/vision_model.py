"""A private vision model: a small ViT of timm's, pretrained on public digits, fine-tuned on others at ε = 8.

    python examples/vision_model.py

Takes about half a minute, and downloads nothing: the weights are those that the federation starts from by default.
"""

from importlib.resources import files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.losses import classification_loss

torch.manual_seed(0)

# Public: a backbone pretrained on MNIST. In earnest: timm.create_model("vit_base_patch16_224", pretrained=True).
model = VisionTransformer(
    img_size=16,
    patch_size=4,
    in_chans=1,
    embed_dim=64,
    depth=4,
    num_heads=4,
    mlp_ratio=2.0,
    class_token=False,
    global_pool="avg",
    num_classes=10,
)
weights = load_file(str(files("lora_dp") / "fed/models/weights/digits_vit.safetensors"))
model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
model.reset_classifier(10)  # a new head, as for classes of one's own

# Private: scikit-learn's 1,797 digits of 8 × 8 pixels.
digits = load_digits()
images = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 8 - 1, size=16, mode="bilinear")
labels = torch.from_numpy(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1437], order[1437:]

model = inject_lora(model, LoRAConfig(r=4, target_modules=["attn.qkv"], trainable_modules=["head"]))
engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    model=model,
    optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5),
    data_loader=DataLoader(TensorDataset(images[train], labels[train]), batch_size=64),
    target_epsilon=8,
    target_delta=1e-5,
    epochs=10,
    max_grad_norm=1.0,
    clipping="automatic",  # every example's gradient is normalised: the learning rate is all there is to tune
    phases="BA",
)
model.train()
for _ in range(10):
    for x, y in loader:
        optimizer.backward(classification_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
model.eval()
with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy {accuracy:.3f}, ε = {engine.get_epsilon(delta=1e-5):.2f} at δ = 1e-5")
