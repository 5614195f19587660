"""Chat templates with the features of those that models come with in 2026, written short: what is trained is what the assistant writes.

Systems merged into a turn or refused, contents stripped, reasoning dropped from earlier turns, prompts that open a thought, ends of turns
that only a next turn brings, answers that are opened unasked, calls of tools, dates, and switches in the contents.
"""

import json
import re
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import AddedToken

from treetune.core.data import formats, prompts, sources, template_date

ALTERNATE = (
    "{% for m in messages if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE + ""
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}" + ALTERNATE + "{% for m in messages %}{{ '<start_of_turn>' "
    "+ ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system goes into the last message, and only where that is the user's: never in what is trained on.
MISTRAL_V3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}"
    "{% set messages = messages[1:] %}{% else %}{{ '[SYSTEM_PROMPT]It is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM_PROMPT]' }}{% endif %}"
    + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}{% else %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA3 = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# A turn ends where the next begins; earlier thoughts are replaced by empty ones.
GLM4 = (
    "[gMASK]<sop>{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}"
    "{% set ns.users = 0 %}{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response>' }}{% elif m.role == 'assistant' %}{{ '<|assistant|>\n<think>' }}{% set answer = m.content or '' %}"
    "{% if '</think>' in answer %}{% set thought = answer.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set answer = answer.split('</think>')[-1] %}{% else %}{% set thought = m.reasoning_content or '' %}{% endif %}"
    "{{ (thought if ns.users > ns.last else '') + '</think>' }}{% if answer | trim %}{{ '\n' + answer | trim }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function.name }}{% for k, v in call.function.arguments.items() %}"
    "{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' + v + '</arg_value>' }}{% endfor %}{{ '\n</tool_call>' }}{% endfor %}"
    "{% else %}{% if m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
APERTUS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '_start|>' + m.content + '<|' + m.role + '_end|>' }}"
    "{% else %}{{ '<|assistant_start|>' + m.content }}{% if not loop.last %}{{ '<|assistant_end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)
# Calls only beside a content that is none, their arguments as text.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{% elif m.content is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{% for call in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' "
    "+ call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% elif m.content is defined %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.' "
    "+ '<|end_of_text|>\n' }}{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# The mode follows from a word in the system message, which is then taken out of it.
SMOLLM3 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% set think = '/no_think' not in system %}"
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + ('/think' if think else '/no_think') "
    "+ '\n\n' + system.replace('/no_think', '').replace('/think', '').rstrip() + '<|im_end|>\n' }}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ ('' if think else '<think>\n\n</think>\n') + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token + ('' if loop.last else '\n') }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# The last turn ends otherwise than the others.
OLMO3 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('environment' if m.role == 'tool' else m.role) + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<function_calls>' + call.function.name + '(' + call.function.arguments | tojson "
    "+ ')</function_calls>' }}{% endfor %}{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEMOTRON = (
    "{% set ns = namespace(think=true) %}{% for m in messages if '/no_think' in (m.content or '') %}{% set ns.think = false %}{% endfor %}"
    "{% for m in messages %}{% set text = (m.content or '').replace('/no_think', '') | trim %}{% if m.role == 'system' %}"
    "{{ '<SPECIAL_10>System\n' + text + '\n' }}{% elif m.role == 'user' %}{{ '<SPECIAL_11>User\n' + text + '\n' }}"
    "{% elif m.role == 'tool' %}{{ '<SPECIAL_11>User\n<TOOL_RESPONSE>[' + text + ']</TOOL_RESPONSE>\n' }}{% else %}"
    "{{ '<SPECIAL_11>Assistant\n' + text.split('</think>')[-1] | trim }}"
    "{% if m.tool_calls %}{{ '<TOOLCALL>[' + m.tool_calls[0].function | tojson + ']</TOOLCALL>' }}{% endif %}"
    "{{ ('' if m.tool_calls and loop.last else '\n') + '<SPECIAL_12>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n' + ('<think>\n' if ns.think else '<think></think>') }}{% endif %}"
)
# The next answer is opened whether it is asked for or not.
COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{% if m.role == 'user' %}{{ '<|USER_TOKEN|>' + m.content }}"
    "{% elif m.role == 'system' %}{{ '<|SYSTEM_TOKEN|>' + m.content }}{% elif m.role == 'tool' %}"
    "{{ '<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m.content + '<|END_TOOL_RESULT|>' }}{% elif m.tool_calls %}"
    '{{ \'<|CHATBOT_TOKEN|><|START_ACTION|>[{"tool_call_id": "0", "tool_name": "\' + m.tool_calls[0].function.name '
    "+ '\", \"parameters\": ' + m.tool_calls[0].function.arguments | tojson + '}]<|END_ACTION|>' }}"
    "{% else %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% if m.role == 'system' %}{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|start|>functions<|channel|>commentary<|message|>' + m.content + '<|end|>' }}{% elif m.role == 'assistant' %}"
    "{% if m.thinking and not later %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' "
    "+ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content "
    "+ ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{% endif %}"
    "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


class Family(NamedTuple):
    """A template, what comes before and behind trained contents, and what is refused or special. In `before` L is the last turn only."""

    template: str
    end: str
    last_end: str = ""  # where it is another
    before: str = ""
    eos: str = "</s>"
    system: str = ""  # why a system message is refused
    calls: str = ""  # what is trained of a call; empty: refused
    ending: str = ""  # what a document has beyond the template's text
    opened: str = ""  # what a template writes behind the last turn
    prompt: bool = True  # a generation prompt is what stands before trained contents


ARGUMENTS = '{"city": "Paris"}'
FUNCTION = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
FAMILIES = {
    "gemma2": Family(GEMMA2, "<end_of_turn>", system="System role not supported"),
    "gemma3": Family(GEMMA3, "<end_of_turn>"),
    "mistral_v3": Family(
        MISTRAL_V3, "</s>", before=" ", system=r"message 1 \(role 'system'\) is not rendered",
        calls='[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>',
    ),
    "mistral_v7": Family(MISTRAL_V7, "</s>", calls=f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}</s>"),
    "llama3": Family(LLAMA3, "<|eot_id|>", eos="<|eot_id|>", calls='{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>'),
    "phi4": Family(PHI4, "<|end|>", last_end="<|end|><|endoftext|>", eos="<|endoftext|>"),
    "glm4": Family(
        GLM4, "<|user|>", before="\n<think></think>\n", eos="<|endoftext|>", ending="<|user|>",
        calls="\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call><|observation|>",
    ),
    "apertus": Family(APERTUS, "<|assistant_end|>", eos="<|assistant_end|>", ending="<|assistant_end|>"),
    "r1": Family(
        R1, "<｜end▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", prompt=False,
        calls="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + ARGUMENTS
        + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    ),
    "granite": Family(
        GRANITE, "<|end_of_text|>", eos="<|end_of_text|>", calls=f"<tool_call>\n{FUNCTION}\n</tool_call><|end_of_text|>",
    ),
    "smollm3": Family(SMOLLM3, "<|im_end|>", eos="<|im_end|>"),
    "olmo2": Family(OLMO2, "<|endoftext|>", eos="<|endoftext|>"),
    "olmo3": Family(
        OLMO3, "<|im_end|>", last_end="<|endoftext|>", eos="<|endoftext|>",
        calls=f"<function_calls>get_weather({ARGUMENTS})</function_calls><|im_end|>",
    ),
    "nemotron": Family(
        NEMOTRON, "\n<SPECIAL_12>", eos="<SPECIAL_12>", prompt=False, calls=f"<TOOLCALL>[{FUNCTION}]</TOOLCALL>\n<SPECIAL_12>",
    ),
    "command": Family(
        COMMAND, "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", before="<|START_RESPONSE|>", eos="<|END_OF_TURN_TOKEN|>",
        opened="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        calls='<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": ' + ARGUMENTS
        + "}]<|END_ACTION|><|END_OF_TURN_TOKEN|>",
    ),
    "harmony": Family(
        HARMONY, "<|end|>", last_end="<|return|>", before="<|channel|>final<|message|>", eos="<|return|>",
        calls=" to=functions.get_weather<|channel|>commentary json<|message|>" + ARGUMENTS + "<|call|>",
    ),
}  # fmt: skip
SOFT = re.compile(r"</?(think|tool_call|tool_response|arg_key|arg_value|function_calls|TOOLCALL|TOOL_RESPONSE)>")
SPECIAL = re.compile(r"<\|[^|<>' ]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?[A-Z_]{3,30}\]|<SPECIAL_\d+>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")
RENDERED = (
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<|endoftext|>",
    "<|user_start|>",
    "<|user_end|>",
)  # made of parts


@pytest.fixture(scope="module")
def shared():
    return {}


@pytest.fixture
def tokenizer(shared, build_tokenizer, variants):
    if not shared:
        shared["it"] = build_tokenizer(variants["byte"])
        texts = "".join(family.template for family in FAMILIES.values())
        tokens = [*dict.fromkeys(SPECIAL.findall(texts)), *RENDERED]
        shared["it"].add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
        soft = dict.fromkeys(match[0] for match in SOFT.finditer(texts))
        shared["it"].add_tokens([AddedToken(token, special=False, normalized=False) for token in soft])
    template_date.choose(template_date.today())  # as transformers has it now
    return shared["it"]


def dressed(tokenizer, family):
    tokenizer.chat_template, tokenizer.eos_token = family.template, family.eos
    return tokenizer


def talk(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def document(messages, tokenizer, **options):
    docs, report = formats.encode_rows(sources.from_list([{"messages": messages}]), tokenizer, format="chat", **options)
    return docs[0], report


def runs(doc, tokenizer):
    cuts = np.split(np.arange(len(doc.tokens)), np.flatnonzero(np.diff(doc.weight)) + 1)
    return [tokenizer.decode(doc.tokens[cut]) for cut in cuts if doc.weight[cut[0]] > 0]


TURNS = talk(("user", "hello"), ("assistant", "the answer"), ("user", "more?"), ("assistant", "It is 4."))
SYSTEM = talk(("system", "Be brief."))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_ends_are_trained_and_nothing_else(name, tokenizer):
    family = FAMILIES[name]
    dressed(tokenizer, family)
    wanted = [f"{family.before}the answer{family.end}", f"{family.before}It is 4.{family.last_end or family.end}"]
    for messages in (TURNS, TURNS[:2], SYSTEM + TURNS):
        if family.system and messages[0]["role"] == "system":
            with pytest.raises(ValueError, match=family.system) as caught:
                document(messages, tokenizer)
            assert "\n" not in str(caught.value)
            continue
        doc, report = document(messages, tokenizer)
        short = [f"{family.before}the answer{family.last_end or family.end}"]
        assert runs(doc, tokenizer) == (short if len(messages) == 2 else wanted) and report.missing_eos == 0
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert doc.tokens.tolist() == tokenizer(text + family.ending, add_special_tokens=False)["input_ids"]
        assert text.endswith(family.opened)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_begins_where_a_prompt_ends(name, tokenizer):
    family = FAMILIES[name]
    dressed(tokenizer, family)
    rows = sources.from_list([{"prompt": TURNS[:3]}])
    prompt = prompts.read_prompts(rows, tokenizer)[0][0].tokens
    doc, _ = document(TURNS, tokenizer, roles_to_train=None)
    start = int(np.flatnonzero(doc.weight)[0])
    same = np.array_equal(doc.tokens[: len(prompt)], prompt)
    assert same == family.prompt and (not same or start == len(prompt))


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def called(arguments):
    function = CALL["function"] | {"arguments": arguments}
    return [
        *talk(("user", "weather?")), {"role": "assistant", "tool_calls": [CALL | {"function": function}]},
        {"role": "tool", "content": "20", "name": "get_weather", "tool_call_id": "abcdefghi"}, *talk(("assistant", "It is 4.")),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_calls_of_tools_are_trained_with_what_ends_them(name, tokenizer):
    family = FAMILIES[name]
    dressed(tokenizer, family)
    last = f"{family.before}It is 4.{family.last_end or family.end}"
    for arguments in ({"city": "Paris"}, ARGUMENTS):
        assert runs(document(called(arguments), tokenizer)[0], tokenizer) == [family.calls, last]
        before = prompts.read_prompts(sources.from_list([{"prompt": called(arguments)[:-1]}]), tokenizer)[0][0].tokens
        assert json.loads(ARGUMENTS)["city"] in tokenizer.decode(before) and '\\"city' not in tokenizer.decode(before)


@pytest.mark.parametrize("name", ["gemma3", "glm4", "r1", "smollm3", "nemotron", "llama3"])
def test_blanks_around_contents(name, tokenizer):
    family = FAMILIES[name]
    dressed(tokenizer, family)
    found = runs(document(talk(("user", " hello\n"), ("assistant", "\n the answer \n")), tokenizer)[0], tokenizer)
    kept = {"r1": "\n the answer \n", "smollm3": " the answer \n"}.get(name, "the answer")
    assert found == [f"{family.before}{kept}{family.end}"]


THOUGHTS = {
    "glm4": ["\n<think></think>\nthe answer<|user|>", "\n<think>well</think>\nIt is 4.<|user|>"],
    "r1": ["the answer<｜end▁of▁sentence｜>", "It is 4.<｜end▁of▁sentence｜>"],
    "nemotron": ["the answer\n<SPECIAL_12>", "It is 4.\n<SPECIAL_12>"],
    "smollm3": ["<think>hm</think>the answer<|im_end|>", "<think>well</think>It is 4.<|im_end|>"],
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_in_contents(name, tokenizer):
    """What a template drops is not trained, and counted."""
    dressed(tokenizer, FAMILIES[name])
    thinking = talk(
        ("user", "hello"), ("assistant", "<think>hm</think>the answer"), ("user", "more?"), ("assistant", "<think>well</think>It is 4.")
    )
    doc, report = document(thinking, tokenizer)
    assert runs(doc, tokenizer) == THOUGHTS[name] and report.missing_parts == {"glm4": 1, "smollm3": 0}.get(name, 2)


def test_a_thought_of_its_own_field(tokenizer):
    dressed(tokenizer, FAMILIES["harmony"])
    thinking = [message | ({"reasoning_content": "well"} if message["role"] == "assistant" else {}) for message in TURNS]
    found = runs(document(thinking, tokenizer)[0], tokenizer)
    analysis = "<|channel|>analysis<|message|>well<|end|><|start|>assistant"
    assert found == ["<|channel|>final<|message|>the answer<|end|>", f"{analysis}<|channel|>final<|message|>It is 4.<|return|>"]


@pytest.mark.parametrize("name", ["smollm3", "nemotron"])
def test_a_switch_in_the_contents_changes_the_template(name, tokenizer):
    """The template takes the word out of the message and writes another text around the answers."""
    family = FAMILIES[name]
    dressed(tokenizer, family)
    messages = [*talk(("system", "Be brief. /no_think")), *TURNS]
    doc, _ = document(messages, tokenizer)
    assert runs(doc, tokenizer) == [f"the answer{family.end}", f"It is 4.{family.end}"]
    assert "/no_think" not in tokenizer.decode(doc.tokens).partition("Be brief.")[2]
    for options, count in (({"train_on_eos": "last"}, 1), ({"roles_to_train": None}, 1)):
        found = runs(document(messages, tokenizer, **options)[0], tokenizer)
        assert sum(family.end in run for run in found) == count
    with pytest.raises(ValueError, match="so the trained span is not known"):
        document(messages, tokenizer, train_on_eos="all")


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral_v3", "mistral_v7"])
def test_turns_that_do_not_alternate_are_refused_in_one_line(name, tokenizer):
    dressed(tokenizer, FAMILIES[name])
    with pytest.raises(ValueError, match="roles must alternate.*; its roles are user, assistant, assistant") as caught:
        document([*TURNS[:2], TURNS[1]], tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama3", "granite", "smollm3", "harmony", "mistral_v7"])
def test_the_date_of_a_template_is_that_of_the_run(name, tokenizer):
    dressed(tokenizer, FAMILIES[name])
    template_date.choose("2025-01-02")
    assert re.search("2025", tokenizer.decode(document(TURNS, tokenizer)[0].tokens))
