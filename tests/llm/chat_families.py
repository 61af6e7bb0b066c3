"""Chat templates in the style of four families, written from their public formats, with a small
tokenizer each.

Their text has `{% generation %}` blocks; `plain` takes these out, as most published templates are.
"""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = """
{%- for turn in messages %}
    {%- if loop.first and turn.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + turn.role + '\\n' }}
    {%- if turn.role == 'assistant' %}
        {%- generation %}{{- turn.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- turn.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """
{{- bos_token }}
{%- for turn in messages %}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' }}
    {%- if turn.role == 'assistant' %}
        {%- generation %}{{- turn.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- turn.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages %}
    {%- if turn.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- turn.content }}
            {%- for call in turn.tool_calls or [] %}
                {{- ('' if loop.first and not turn.content else '\\n') + '<tool_call>\\n' }}
                {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
                {{- '\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif turn.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + turn.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MISTRAL = """
{{- bos_token }}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + ' [/AVAILABLE_TOOLS]' }}{%- endif %}
{%- set seen = namespace(system='', before='assistant') %}
{%- for turn in messages %}
    {%- if turn.role == 'system' %}
        {%- if not loop.first %}{{- raise_exception('the system turn must be the first') }}{%- endif %}
        {%- set seen.system = turn.content + '\\n\\n' %}
    {%- else %}
        {%- if turn.role == 'user' and seen.before != 'assistant'
            or turn.role == 'assistant' and seen.before == 'assistant' %}
            {{- raise_exception('user and assistant must alternate') }}
        {%- endif %}
        {%- set seen.before = turn.role %}
        {%- if turn.role == 'user' %}
            {{- '[INST] ' + seen.system + turn.content + ' [/INST]' }}
            {%- set seen.system = '' %}
        {%- elif turn.role == 'tool' %}
            {{- '[TOOL_RESULTS] ' + turn.content + ' [/TOOL_RESULTS]' }}
        {%- else %}
            {%- generation %}
                {%- if turn.tool_calls %}{{- '[TOOL_CALLS] ' + (turn.tool_calls | tojson) }}{%- endif %}
                {%- if turn.content %}{{- ' ' + turn.content }}{%- endif %}
                {{- eos_token }}
            {%- endgeneration %}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""

TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}
# The first two tokens of each are its bos and eos.
SPECIAL = {
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    + ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
}
TEXTS = [
    "system user assistant tool\n\n",
    "What is the weather in Paris? It is 20 degrees and sunny.\n",
    "Hi! Hello.\n\n",
]


def family_tokenizer(family: str, template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens with the special tokens of a family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = SPECIAL[family]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 4, trainer)
    bos, eos, *others = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    tokenizer.chat_template = template
    return tokenizer


def plain(template: str) -> str:
    """The template without its blocks."""
    return re.sub(r"\{%- (end)?generation %\}", "", template)
