"""MiniLMv2 in Hugging Face's Trainer: a small BERT learns the q-q, k-k and v-v relations of a larger one.

pip install 'fastkd[examples]'
python examples/transformers_bert.py
"""

from typing import Any

import gain
import sklearn.datasets
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from fastkd import attention_loss, capture, qkv_relation_loss

RELATION_HEADS = 8  # any number that divides both widths, whatever the networks' own head counts


def projections(model: nn.Module) -> list[str]:
    """Return the names of the last layer's q, k and v projections, which every attention implementation calls."""
    attention = [name for name, module in model.named_modules() if isinstance(module, BertSelfAttention)][-1]
    return [f"{attention}.{name}" for name in ("query", "key", "value")]


def forward(student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """Return the student's output and the MiniLMv2 loss of a padded batch."""
    is_word = inputs["attention_mask"].bool()
    with (
        capture.tokens(student, projections(student), prefix="keep") as s,
        capture.tokens(teacher, projections(teacher), prefix="keep") as t,
    ):
        output = student(**inputs)
        with torch.no_grad():
            teacher(**inputs)
        return output, qkv_relation_loss(
            (s[0], s[1], s[2]), (t[0], t[1], t[2]), relation_heads=RELATION_HEADS, key_mask=is_word, query_mask=is_word
        )


class MiniLMTrainer(Trainer):
    def __init__(self, teacher: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        # compute_loss returns the mean over a batch, so the Trainer must divide it when it accumulates gradients.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output, loss = forward(model, self.teacher, inputs)
        return (loss, output) if return_outputs else loss


def sentences() -> list[str]:
    """Return lines of the descriptions of scikit-learn's datasets, of 4 to about 20 words each."""
    names = ("iris", "wine", "breast_cancer", "digits", "diabetes", "linnerud")
    texts = [getattr(sklearn.datasets, f"load_{name}")().DESCR for name in names]
    return [line.strip() for text in texts for line in text.splitlines() if len(line.split()) >= 4]


def word_pieces(lines: list[str]) -> PreTrainedTokenizerFast:
    """Return a BERT-style tokenizer trained on the lines. In your own project, use AutoTokenizer.from_pretrained."""
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    special = list(names.values())
    tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special))
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(*((token, ids[token]) for token in ("[SEP]", "[CLS]")))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def config(vocab_size: int, hidden_size: int, layers: int, heads: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
    )


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil without labels. Return the held-out MiniLMv2 loss before and after."""
    torch.manual_seed(0)
    lines = sentences()
    tokenizer = word_pieces(lines)
    rows = [{"input_ids": ids} for ids in tokenizer(lines)["input_ids"]]
    train, held_out = [row for i, row in enumerate(rows) if i % 5], rows[::5]
    options = TrainingArguments(
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    teacher = BertForMaskedLM(config(len(tokenizer), 96, layers=3, heads=3))
    Trainer(teacher, options, DataCollatorForLanguageModeling(tokenizer), train).train()
    student = BertModel(config(len(tokenizer), 48, layers=2, heads=2))
    pad = DataCollatorWithPadding(tokenizer)
    trainer = MiniLMTrainer(teacher.bert, student, options, pad, train)

    def distance() -> float:
        with torch.no_grad():
            return forward(student.eval(), teacher.bert, pad(held_out).to(trainer.args.device))[1].item()

    before = distance()
    trainer.train()
    after = distance()
    print(f"held-out MiniLMv2 loss {before:.5f} -> {after:.5f}")
    # One relation costs what a map costs; MiniLMv2 has three.
    gain.report("attention maps of 6 heads, 197 tokens", attention_loss, gain.attention_maps, gain.queries_and_keys)
    return before, after


if __name__ == "__main__":
    main()
