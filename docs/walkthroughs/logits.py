r"""
Soft targets, DKD and NKD: what the answers tell
================================================

A teacher's answer says more than its best class: which wrong classes are close. Soft
targets take the whole answer. DKD and NKD separate the target from the others, because
a confident teacher leaves the others almost no weight.
"""

import digits
import matplotlib.pyplot as plt
import torch

import fastkd

torch.manual_seed(0)
train, held_out = digits.load()
teacher = digits.teacher()
images, labels = (x[:256] for x in held_out.tensors)
with torch.no_grad():
    answers = teacher(images)

# %%
# On its own answer a student has no loss left, except NKD, which is a cross-entropy.

soft = fastkd.soft_target_loss(answers, answers, temperature=4.0)
dkd = fastkd.dkd_loss(answers, answers, labels)
nkd = fastkd.nkd_loss(answers, answers, labels)
print(f"soft {soft:.2e}, DKD {dkd:.2e}, NKD {nkd:.4f}")

# %%
# The gradients show what each asks of a student that knows nothing: how it wants to
# move the logits of the digit that the teacher is least sure of.

least = answers.softmax(1).max(1).values.argmin()
answer, label = answers[least : least + 1], labels[least : least + 1]
print(
    f"a {label.item()}: the teacher says",
    [f"{p:.2f}" for p in answer.softmax(1)[0].tolist()],
)
losses = {
    "soft targets, T = 1": lambda x: fastkd.soft_target_loss(
        x, answer, temperature=1.0
    ),
    "soft targets, T = 4": lambda x: fastkd.soft_target_loss(
        x, answer, temperature=4.0
    ),
    "DKD, alpha 1, beta 4": lambda x: fastkd.dkd_loss(
        x, answer, label, alpha=1.0, beta=4.0
    ),
    "NKD": lambda x: fastkd.nkd_loss(x, answer, label),
}

figure, axes = plt.subplots(
    1, 5, figsize=(11, 2.4), layout="constrained", width_ratios=[1, 1.6, 1.6, 1.6, 1.6]
)
axes[0].imshow(images[least, 0], cmap="gray")
axes[0].set_axis_off()
for axis, (name, loss) in zip(axes[1:], losses.items(), strict=True):
    student = torch.zeros(1, 10, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(student), student)
    axis.bar(range(10), -gradient[0])
    axis.set_title(name, fontsize=9)
    axis.set_xticks(range(10))
figure.show()
