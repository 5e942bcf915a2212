"""`model.save_pretrained_gguf(folder, tokenizer, quantization_method=...)`, judged by llama.cpp."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastllm._errors import ArgumentError, ModelError, TokenizerError, UnsupportedError
from fastllm.gguf import GGUFReader, atomic
from fastllm.gguf.atomic import SaveError
from fastllm.models import gguf_saving

from ..gguf import faults
from ..gguf.models import VOCAB_SIZE, save_byte_level_tokenizer, tiny_model
from ..models.families import FAMILIES
from .checkpoints import EXPERTS, SHARDED, adapted, load, log_probs, make_base, on_16_bit_base

PROMPTS = [[17], [5, 301, 44, 250, 7, 99], list(range(40, 54))]
CHAT = [{"role": "user", "content": "When does it open?"}]


def divergence(judge, path, model, *, vocab_size=VOCAB_SIZE, **options) -> float:
    """Largest KL(model || llama.cpp) of the next token over the prompts, in nats."""
    found = []
    with judge.loaded(path, vocab_size, **options) as loaded:
        for ids in PROMPTS:
            expected = log_probs(model, torch.tensor([ids]))[-1]
            got = torch.from_numpy(loaded.next_token_logprobs(ids)).double()[: len(expected)]
            found.append(float((expected.exp() * (expected - got)).sum()))
    return max(found)


def types_of(path) -> dict[str, str]:
    with GGUFReader(path) as reader:
        return {name: info.type.name for name, info in reader.tensors.items()}


@pytest.fixture(scope="module")
def trained(base_of):
    return adapted(base_of("llama"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(model, tokenizer) whose rows hold whole K-quant blocks."""
    base = tmp_path_factory.mktemp("wide") / "wide-llama"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(base)
    save_byte_level_tokenizer(base)
    return adapted(base, bits=4)


# --- llama.cpp predicts what the trained model predicts --------------------------------------------------------------


# Those of the small models whose scaling and windows llama.cpp has; tests/gguf has the Gemma 2 and 3 that it can run.
EXPORTABLE = [family for family in FAMILIES if family not in ("gemma2", "gemma3_text")]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", [*EXPORTABLE, SHARDED])
def test_a_file_is_the_adapter_on_the_16_bit_base(judge, base_of, tmp_path, family, bits):
    base = base_of(family)
    model, tokenizer = adapted(base, bits)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    (path,) = written["gguf_files"]
    assert divergence(judge, path, on_16_bit_base(model, base, tmp_path / "adapter")) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens"]}, {"bias": "all"}],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_lora(judge, base_of, tmp_path, options):
    """Qwen2, whose head is the embedding: trained on its own, it is a tensor of its own."""
    model, tokenizer = adapted(base_of("qwen2"), **options)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    (path,) = written["gguf_files"]
    assert ("output.weight" in types_of(path)) == ("modules_to_save" in options)
    assert divergence(judge, path, model) < 1e-5


@pytest.mark.parametrize("family", EXPERTS)
def test_experts(judge, base_of, tmp_path, family):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model, tokenizer = adapted(base_of(family), target_modules=["q_proj"], target_parameters=experts)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    assert divergence(judge, written["gguf_files"][0], model) < 1e-5


def test_a_larger_vocabulary(judge, base_of, tmp_path):
    model, tokenizer = load(base_of("llama"), resize_model_vocab=520)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    assert divergence(judge, written["gguf_files"][0], model, vocab_size=520) < 1e-5


def test_a_4_bit_checkpoint_is_dequantised(judge, base_of, tmp_path, messages):
    first, tokenizer = load(base_of("llama"))
    four_bit = first.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    model, tokenizer = adapted(four_bit, bits=4)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    assert "merging into the loaded weights, dequantised" in messages()
    # in memory each 4-bit weight is rounded to bf16 before it is used, in the file it is not
    assert divergence(judge, written["gguf_files"][0], model) < 1e-4


def test_a_trained_model_answers_in_llama_cpp_as_in_python(judge, base_of, tmp_path):
    """End to end: LoRA training, export to 8 bits, the chat template and greedy answers."""
    from fastllm import FastLanguageModel

    answers = {"When does it open?": "At nine.", "When does it close?": "At half past five.", "Why?": "The roof leaks."}
    model, tokenizer = load(base_of("llama"), bits=4)
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        for question, answer in answers.items()
    ]  # fmt: skip
    for _ in range(60):
        for ids in rows:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    written = model.save_pretrained_gguf(tmp_path / "assistant", tokenizer)
    path = Path(written["gguf_files"][0])
    assert path == tmp_path / "assistant_gguf" / "llama.Q8_0.gguf"
    with judge.loaded(path, VOCAB_SIZE) as loaded:
        for question, answer in answers.items():
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert loaded.apply_template(messages) == prompt
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            assert loaded.tokenize(prompt) == ids
            expected = tokenizer.encode(answer, add_special_tokens=False)
            assert loaded.greedy(ids, len(expected)) == expected


def test_one_beginning_of_text_where_tokenizer_and_template_both_write_it(judge, tmp_path):
    """In Python the template's text is encoded without special tokens; llama.cpp has to end up with the same ids."""
    base = make_base(tmp_path / "base", "llama")
    save_byte_level_tokenizer(base, adds_bos=True)
    model, tokenizer = load(base)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    with judge.loaded(written["gguf_files"][0], VOCAB_SIZE) as loaded:
        assert loaded.chat_prompt_tokens(CHAT) == len(expected)


# --- types, names and the files beside -------------------------------------------------------------------------------

# Largest divergence of this random model in each type: some 2.5 times what was measured.
LIMITS = {
    "f32": 1e-5, "f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-3, "q6_k": 5e-3, "q5_k_m": 0.015, "q5_k_s": 0.015, "q5_1": 0.025,
    "q5_0": 0.03, "q4_k_m": 0.08, "q4_k_s": 0.08, "q4_1": 0.2, "q4_0": 0.1, "iq4_nl": 0.06, "iq4_xs": 0.08,
    "q3_k_l": 0.2, "q3_k_m": 0.2, "q3_k_s": 0.25, "q2_k": 0.5,
}  # fmt: skip


def test_every_type_in_one_pass_over_the_weights(judge, wide, tmp_path):
    model, tokenizer = wide
    reference = on_16_bit_base(model, model.config._name_or_path, tmp_path / "adapter")
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=list(LIMITS))
    assert [Path(path).name for path in written["gguf_files"]] == [f"wide-llama.{n.upper()}.gguf" for n in LIMITS]
    sizes = {name: os.path.getsize(path) for name, path in zip(LIMITS, written["gguf_files"], strict=True)}
    assert sizes["q2_k"] < sizes["q3_k_m"] < sizes["q4_k_m"] < sizes["q5_k_m"] < sizes["q6_k"] < sizes["q8_0"]
    for (name, limit), path in zip(LIMITS.items(), written["gguf_files"], strict=True):
        assert divergence(judge, path, reference) < limit, name


@pytest.mark.parametrize(
    ("method", "files"),
    [
        (None, ["Q8_0"]),
        ("quantized", ["Q4_K_M"]),
        ("fast_quantized", ["Q8_0"]),
        ("not_quantized", ["BF16"]),
        ("Q4-K-M", ["Q4_K_M"]),
        (["q4_k_m", "Q4_K_M", "quantized", "f16"], ["Q4_K_M", "F16"]),
    ],
)
def test_aliases(base_of, tmp_path, method, files):
    model, tokenizer = load(base_of("llama"), dtype=torch.bfloat16)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=method)
    assert [Path(path).name for path in written["gguf_files"]] == [f"llama.{kind}.gguf" for kind in files]


def test_what_is_written_and_returned(trained, tmp_path):
    model, tokenizer = trained
    written = model.save_pretrained_gguf(str(tmp_path / "assistant"), tokenizer, quantization_method=["q8_0", "f16"])
    folder = tmp_path / "assistant_gguf"
    assert written == {
        "save_directory": str(tmp_path / "assistant"),
        "gguf_directory": str(folder),
        "gguf_files": [str(folder / "llama.Q8_0.gguf"), str(folder / "llama.F16.gguf")],
        "modelfile_location": str(folder / "Modelfile"),
        "want_full_precision": True,
        "is_vlm": False,
        "fix_bos_token": False,
    }
    assert {path.name for path in folder.iterdir()} == {"llama.Q8_0.gguf", "llama.F16.gguf", "Modelfile"}
    assert [path.name for path in tmp_path.iterdir()] == ["assistant_gguf"]
    modelfile = (folder / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./llama.Q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    with GGUFReader(folder / "llama.Q8_0.gguf") as reader:
        assert reader.metadata["tokenizer.chat_template"] == tokenizer.chat_template


def test_the_template_that_was_trained_is_the_one_that_is_saved(base_of, tmp_path):
    from fastllm.chat_templates import get_chat_template

    model, tokenizer = load(base_of("llama"))
    tokenizer = get_chat_template(tokenizer, "alpaca")
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    assert "### Instruction:" in Path(written["modelfile_location"]).read_text()
    with GGUFReader(written["gguf_files"][0]) as reader:
        assert "### Instruction:" in reader.metadata["tokenizer.chat_template"]


def test_without_a_chat_template_there_is_no_modelfile(base_of, tmp_path, messages):
    model, tokenizer = load(base_of("llama"))
    tokenizer.chat_template = None
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    assert written["modelfile_location"] is None
    assert "no Modelfile is written" in messages()


def test_the_adapter_alone_on_the_file_of_its_base(judge, base_of, tmp_path):
    """llama.cpp adds it to the base model when it runs."""
    base, tokenizer = load(base_of("llama"))
    base_file = base.save_pretrained_gguf(tmp_path / "base", tokenizer, quantization_method="f32")["gguf_files"][0]
    model, tokenizer = adapted(base_of("llama"))
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, save_method="lora", quantization_method="f32")
    (path,) = written["gguf_files"]
    assert Path(path).name == "llama-lora-f32.gguf"
    assert divergence(judge, base_file, model, lora=path) < 1e-5
    assert divergence(judge, base_file, model) > 1e-3


def test_any_peft_model_can_be_exported(judge, base_of, tmp_path):
    from fastllm.save import save_pretrained_gguf

    from ..models.families import with_lora
    from .checkpoints import plain

    model, tokenizer = plain(base_of("qwen3"))
    model = with_lora(model)
    written = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f32")
    assert divergence(judge, written["gguf_files"][0], model) < 1e-5


# --- before training, and what is refused -----------------------------------------------------------------------------


def test_the_plan_is_known_before_training(trained, tmp_path):
    model, tokenizer = trained
    plan = model.export_plan("gguf", quantization_method="q8_0")
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="q8_0")
    assert plan.describe().startswith(f"llama, q8_0: {os.path.getsize(written['gguf_files'][0]):,} bytes, 8.5")
    assert model.export_plan().quantization == "q8_0"
    with pytest.raises(ArgumentError, match="one method at a time"):
        model.export_plan(quantization_method=["q8_0", "f16"])
    with pytest.raises(ArgumentError, match="did you mean 'gguf'"):
        model.export_plan("ggu")


def test_an_architecture_without_gguf_is_refused_before_training(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=4,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"'gpt_neox' can't be exported to GGUF[\s\S]*merged_16bit"):
        model.export_plan("gguf")
    with pytest.raises(UnsupportedError, match="gpt_neox"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    assert not (tmp_path / "out_gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization_method": "q4_k_mm"}, UnsupportedError, "did you mean 'q4_k_m'"),
        ({"quantization_method": "iq2_xxs"}, UnsupportedError, "no quantization method 'iq2_xxs'"),
        ({"quantization_method": 4}, ArgumentError, "quantization_method"),
        ({"quantization_method": []}, ArgumentError, "quantization_method"),
        ({"quantization_method": ["q8_0", 4]}, ArgumentError, "not a name"),
        ({"quantization_method": "dynamic_q4_k_m"}, ArgumentError, "calibration_dataset=dataset"),
        ({"quantization_method": "dynamic_q4"}, UnsupportedError, "no quantization method 'q4'"),
        ({"quantization_method": "q4_k_m", "target_bpw": 4.6}, ArgumentError, "dynamic_q4_k_m"),
        ({"save_method": "merged_4bit"}, ArgumentError, "save_method"),
        ({"save_method": "lora", "quantization_method": "q4_k_m"}, UnsupportedError, "not stored as 'q4_k_m'"),
        ({"imatrix_file": True}, UnsupportedError, "not downloaded"),
        ({"quantisation_method": "q8_0"}, ArgumentError, "did you mean 'quantization_method'"),
        ({"state_dict": {}}, UnsupportedError, "not the model's"),
    ],
)
def test_arguments_that_can_not_be_served(trained, tmp_path, arguments, error, message):
    model, tokenizer = trained
    with pytest.raises(error, match=message):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, **arguments)
    assert not (tmp_path / "out_gguf").exists()


def test_arguments_of_unsloth_without_effect_are_told(trained, tmp_path, messages):
    model, tokenizer = trained
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, first_conversion="f16", maximum_memory_usage=0.85)
    said = messages()
    assert "first_conversion has no effect" in said
    assert "maximum_memory_usage has no effect" in said


def test_a_model_without_its_tokenizer(base_of, tmp_path):
    from fastllm.save import save_pretrained_gguf

    from .checkpoints import plain

    model, _ = plain(base_of("llama"))
    with pytest.raises(TokenizerError, match="none was given"):
        save_pretrained_gguf(model, tmp_path / "out")


def test_an_adapter_that_is_broken_leaves_no_file(base_of, tmp_path):
    model, tokenizer = adapted(base_of("llama"))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[3] = float("inf")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight: [\s\S]*not numbers"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    assert list((tmp_path / "out_gguf").iterdir()) == []


def test_a_disk_that_is_too_small_is_known_before_the_first_byte(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(gguf_saving, "export_gguf", lambda *args, **options: pytest.fail("wrote"))
    with pytest.raises(SaveError, match="bytes needed, 1,000,000 free"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=["q8_0", "f16"])
    assert not (tmp_path / "out_gguf").exists()


def test_the_disk_is_told_which_tensors_come_next(tmp_path, monkeypatch):
    """Each is announced once, some tensors before it is needed, also one without any values."""
    from safetensors.torch import load_file, save_file

    from fastllm.models.checkpoints import Checkpoint
    from fastllm.models.merge_plan import plan_merge

    events = []

    def telling(name, original):
        return lambda self, tensor: events.append((name, tensor)) or original(self, tensor)

    for name in ("prefetch", "tensor"):
        monkeypatch.setattr(Checkpoint, name, telling(name, getattr(Checkpoint, name)))
    model, _ = load(make_base(tmp_path / "base", SHARDED))
    events.clear()
    names = [name for name, _ in gguf_saving.merged_tensors(plan_merge(model), torch.device("cpu"))]
    announced = [name for event, name in events if event == "prefetch"]
    assert announced == names[gguf_saving._AHEAD :]
    for name in announced:
        assert events.index(("prefetch", name)) < events.index(("tensor", name))
    save_file({"a": torch.ones(3), "none": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    few = Checkpoint(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        few.prefetch(name)
        assert torch.equal(few.tensor(name), tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_at_any_moment(base_of, tmp_path, monkeypatch):
    """Under the final name there is the old file, the new one, or nothing."""
    model, tokenizer = load(make_base(tmp_path / "base", "llama", num_hidden_layers=1))

    def save():
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)

    save()
    path, kills = tmp_path / "out_gguf" / "base.Q8_0.gguf", 0
    whole = path.read_bytes()
    path.unlink()
    while faults.killed_at(monkeypatch, kills + 1, save):
        kills += 1
        assert not path.exists() or path.read_bytes() == whole
        assert kills < 200
    assert kills > 15
    assert path.read_bytes() == whole


def test_other_processes_of_a_distributed_run_write_nothing(trained, tmp_path):
    model, tokenizer = trained
    assert model.save_pretrained_gguf(tmp_path / "out", tokenizer, is_main_process=False) == {}
    assert list(tmp_path.iterdir()) == []
