"""Values that no command can use, in every section of a config: one sentence each, before weights.

The configs are composed once; each case sets one key and runs the command with it.
"""

import shlex
from pathlib import Path

import pytest
from bad_files import contents, make_models, refuse_weights, write_good_files
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser

from unlora.cli.compose import composed
from unlora.cli.overrides import given, normalised, with_own_data
from unlora.config.unused_keys import unused
from unlora.errors import InputError, system_in_words
from unlora.recipes import alternate_answers, train
from unlora.recipes import evaluate as eval

LONG, LONGER, DEEP = "x" * 300, "x" * 5000, "a/" * 3000
UNLEARN = ("unlearn", "experiment=unlearn/own/lora", "data.forget=forget.jsonl",
           "data.retain=retain.jsonl", "trainer=NPO", "model=models/root")  # fmt: skip
TRAIN = ("train", "experiment=finetune/own/lora", "data.train=forget.jsonl", "model=models/root")
EVAL = ("eval", "data.forget=forget.jsonl", "model=models/root")
ALTERNATES = ("alternates", "experiment=unlearn/own/lora", "data.forget=forget.jsonl",
              "model=models/root")  # fmt: skip
RUN = {
    "train": train.run,
    "unlearn": train.run,
    "eval": eval.run,
    "alternates": alternate_answers.run,
}
ODD = {
    UNLEARN: f"""
    data.forget= {LONG} {LONGER} {DEEP} /dev/null /dev/zero /proc/self/mem '' null 3 1e5 true
        [forget.jsonl] {{a:1}} . https://x.invalid/a.jsonl retain.jsonl forget.jsonl.gz
    data.retain= '' {LONG} 3
    data.holdout= nowhere.jsonl {LONG} .
    data.train= retain.jsonl
    data.anchor= x 3
    data.frget= x
    question_key= '' 3 [a] nowhere {LONG}
    task_name= {LONG} {DEEP}x '' . .. / a/../b ' ' a/ [] {{}} null
    paths.output_dir= {LONG} {DEEP}x '' null / . .. 3 [] forget.jsonl forget.jsonl/x /dev/null
        /dev/mine /proc/mine /sys/mine models/root "~/x"
    paths.root_dir= {LONG} null /dev 3
    paths.datasets_dir= {LONG} nowhere 3 forget.jsonl
    paths.x= 1
    retain_logs_path= {LONG} {LONGER} 3 [] true nowhere.json forget.jsonl /dev/null /dev/zero .
    eval.own.target_logs_path= {LONG} forget.jsonl 3
    eval.own.batch_size= 0 x 1e30 -1
    eval.own.token_budget= -1 x
    eval.own.max_new_tokens= 0 1.5 [] x
    eval.own.panel_rows= 0 x
    eval.own.panel= 3 [x] x
    eval.own.cache= 3 x
    eval.own.overwrite= x
    eval.own.gradient_modules= 3 [3]
    eval.own.fluency_classifier= 3 []
    eval.own.fluency_label= 3
    eval.own.metrics= null
    eval.own.metrics.x= 1 {{handler:nix}} {{handler:rouge}}
    eval.own.metrics.forget_Q_A_ROUGE.rouge_type= nix
    eval.own.metrics.forget_Q_A_ROUGE.inputs= 3 {{answers:nix}}
    eval.own.metrics.forget_Q_A_ROUGE.higher_is_better= x
    eval.own.metrics.mia_min_k.k= 7 x
    eval.own.metrics.mia_min_k.nix= 1
    eval.own.data= null
    eval.own.data.x= 3
    eval.own.data.forget= null
    eval.own.data.forget.hf_args= null
    eval.own.data.forget.max_length= 1 0 x 1.5
    eval.own.x= 1
    eval.own= null 3
    eval.nix.handler= x
    eval.own.handler= x
    model.use_lora= x 3
    model.lineage= x 3
    model.as_trained= x
    model.x= 1
    model.lora_config.r= 1e3 true 0 x
    model.lora_config.lora_alpha= nan 0 x
    model.lora_config.target_modules= [] 3 [3] ''
    model.lora_config.layers_to_transform= x 1.5
    model.lora_config.rank_pattern= 3 {{q_proj:0}}
    model.lora_config.alpha_pattern= {{q_proj:-1}}
    model.lora_config.task_type= X
    model.lora_config.fan_in_fan_out= 3
    model.model_args.attn_implementation= 3
    model.model_args.device_map= tpu cuda:x 3
    model.model_args.quantization_config= 3 x
    model.model_args.revision= 3
    model.model_args.subfolder= {LONG} 3
    model.model_args.cache_dir= 3
    model.model_args.trust_remote_code= x
    model.model_args.rope_scaling= 3
    model.model_args.torch_dtype= int8 3 x
    model.model_args.token= [a] {{a:1}}
    model.model_args.use_safetensors= false
    model.model_args.x= 1
    model.tokenizer_args.pretrained_model_name_or_path= nowhere {LONG} 3
    model.tokenizer_args.model_max_length= 0 x
    model.tokenizer_args.legacy= 3
    model.tokenizer_args.x= 1
    model.template_args.apply_chat_template= 3
    model.template_args.system_prompt= 3
    model.template_args.x= 1
    trainer.args= null 3
    trainer.args.seed= 4294967296 -1 x 1.5
    trainer.args.nix= 1
    trainer.args.max_steps= 1.5 x
    trainer.args.optim= nix
    trainer.args.hub_token= [a]
    trainer.method_args= null 3
    trainer.method_args.beta= null [1] x nan
    trainer.method_args.nix= 1
    trainer.plugins= 3
    trainer.on_divergence= x
    trainer.x= 1
    global_batch_size= x -1 0 1.5
    mode= x eval finetune null
    collator.x= 1
    """,
    TRAIN: """
    data.forget= forget.jsonl
    data.retain= retain.jsonl
    data.anchor= forget
    data.train= null {} {a:{}} [] [nowhere.jsonl] [3]
        {a:{handler:nix,args:{hf_args:{path:forget.jsonl}}}}
        {a:{handler:QADataset,args:{hf_args:{path:forget.jsonl,split:nix}}}}
        {a:{handler:QADataset,args:{hf_args:{path:forget.jsonl},max_length:1}}}
        {a:{handler:PretrainingDataset,args:{hf_args:{path:forget.jsonl}}}}
    question_key= nix
    answer_key= nix
    trainer.handler= NPO 3
    trainer.method_args.beta= 1
    """,
    EVAL: """
    data.train= forget.jsonl
    data.forget= nowhere null
    data.retain= nowhere
    paths.output_dir= /dev/mine
    eval.own.output_dir= elsewhere /tmp/elsewhere
    seed= x -1
    retain_logs_path= models/root nowhere
    eval.own.data.forget.question_key= nix
    eval.own.data.forget.hf_args.split= nix
    eval.own.data.forget.handler= nix
    trainer.args.seed= 1
    """,
    ALTERNATES: """
    alternates.repeats= 0 x
    alternates.tries= 0
    alternates.temperature= 0 nan x
    alternates.top_p= 2 0
    alternates.max_new_tokens= 0
    alternates.batch_size= 0
    alternates.seed= -1 x 4294967296
    alternates.prompt= x '"{nix}"' 3
    alternates.voice= x root
    alternates.x= 1
    data.forget= nowhere
    data.retain= retain.jsonl
    data.holdout= retain.jsonl
    data.train= retain.jsonl
    question_key= nix
    """,
}


def cases():
    """All of them; every sixth by default."""
    number = 0
    for base, table in ODD.items():
        key = ""
        for word in shlex.split(table, posix=False):
            if word.endswith("=") and len(word) > 1:
                key = word
            else:
                number += 1
                yield pytest.param(
                    base, key + word, id=f"{base[0]} {key}{word[:40]}",
                    marks=[] if number % 6 == 0 else pytest.mark.slow,
                )  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write_good_files(folder)
    make_models(folder / "models", adapters=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        refuse_weights(patch)
        yield folder


@pytest.fixture(scope="module")
def bases(here):
    return {
        base: composed(base[0], with_own_data(words) if base[0] == "eval" else words)
        for base in ODD
        if (words := normalised(base[1:]))
    }


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("base, word", cases())
def test_a_value_that_cannot_be_used_is_one_sentence(base, word, bases, here):
    before = contents(here)
    cfg = bases[base].copy()
    [override] = normalised([word])
    with pytest.raises(InputError) as said, system_in_words():
        ConfigLoaderImpl._apply_overrides_to_config(
            OverridesParser.create().parse_overrides([override]), cfg
        )
        if wrong := unused(cfg, given([override])):
            raise InputError(wrong[0])
        RUN[base[0]](cfg)
    assert len(str(said.value)) > 10 and len(str(said.value).splitlines()) <= 3, str(said.value)
    assert contents(here) == before and not Path("/dev/mine").exists()
