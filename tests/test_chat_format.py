"""Conversations: spans, loss mask, tool calls, and the Jinja template that must say the same."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.chat_format import conversation_spans
from nanochat_hf.tokenizer import SPECIAL_TOKENS, encode_conversation, encode_prompt, encode_text, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["What is 12/60? Ask the calculator, it answers 0.2 at once. Übung: naïve 水車 ✓"] * 2, 300)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def text(content):
    return {"type": "text", "text": content}


def python(content):
    return {"type": "python", "text": content}


def output(content):
    return {"type": "python_output", "text": content}


def call(arguments, **rest):
    return {"type": "function", "function": {"name": "calculator", "arguments": arguments}, **rest}


def tool(content, **rest):
    return {"role": "tool", "content": content, **rest}


def written(messages) -> str:
    """Spans as a string, trained ones in capitals."""
    return "".join(span.text.upper() if span.trained else span.text for span in conversation_spans(messages))


def by_template(tokenizer, messages, **arguments):
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **arguments)
    return encoded["input_ids"], encoded["assistant_masks"]


def test_what_is_trained_on():
    parts = [text("it is "), python("12/60"), output("0.2"), text("so 0.2")]
    assert written([{"role": "system", "content": "be brief"}, user("hi"), assistant(parts), user("ok")]) == (
        "<|bos|><|user_start|>be brief\n\nhi<|user_end|>"
        "<|assistant_start|>IT IS <|PYTHON_START|>12/60<|PYTHON_END|><|output_start|>0.2<|output_end|>SO 0.2"
        "<|ASSISTANT_END|><|user_start|>ok<|user_end|>"
    )


PARTS = [text("It is "), python('"apple\\pie".count("p")'), output("3"), text("3.")]
EXPRESSION = '"apple\\pie".count("p")'
SAME_AS_PARTS = {
    "mapping": [assistant("It is ", tool_calls=[call({"expression": EXPRESSION})]), tool("3"), assistant("3.")],
    "other argument name": [assistant("It is ", tool_calls=[call({"code": EXPRESSION})]), tool("3"), assistant("3.")],
    "JSON text": [
        assistant("It is ", tool_calls=[call('{"expression": "\\"apple\\\\pie\\".count(\\"p\\")"}', id="c1")]),
        tool("3", tool_call_id="c1"),
        assistant("3."),
    ],
    "bare text": [assistant("It is ", tool_calls=[call(EXPRESSION)]), tool("3"), assistant("3.")],
    "unwrapped, parts": [
        assistant([text("It is ")], tool_calls=[{"name": "calculator", "arguments": {"expression": EXPRESSION}}]),
        tool([text("3")]),
        assistant([text("3.")]),
    ],
    "no calls after all": [assistant(PARTS, tool_calls=[])],
}


@pytest.mark.parametrize("messages", SAME_AS_PARTS.values(), ids=SAME_AS_PARTS)
def test_tool_calls_mean_the_same_as_parts(tokenizer, messages):
    expected = encode_conversation(tokenizer, [user("p?"), assistant(PARTS), user("ok")])
    assert encode_conversation(tokenizer, [user("p?"), *messages, user("ok")]) == expected
    assert by_template(tokenizer, [user("p?"), *messages, user("ok")]) == expected


def test_parallel_calls_are_answered_in_order(tokenizer):
    calls = [call({"expression": "1+1"}, id="a"), call({"expression": "2+2"}, id="b")]
    messages = [user("?"), assistant(None, tool_calls=calls), tool("2", tool_call_id="a"), tool("4"), assistant("2, 4")]
    parts = [python("1+1"), output("2"), python("2+2"), output("4"), text("2, 4")]
    expected = encode_conversation(tokenizer, [user("?"), assistant(parts)])
    assert encode_conversation(tokenizer, messages) == by_template(tokenizer, messages) == expected
    messages[2]["tool_call_id"] = "b"
    with pytest.raises(ValueError, match="answers tool call 'b'"):
        encode_conversation(tokenizer, messages)
    with pytest.raises(jinja2.TemplateError, match="answered by"):
        by_template(tokenizer, messages)


CONVERSATIONS = {
    "one question": [user("Hi")],
    "two turns": [user("  Hi\n"), assistant("\n Hello \n"), user(""), assistant("")],
    "system": [{"role": "system", "content": "Übe.\n"}, user("x"), assistant("水車 ✓")],
    "user parts": [user([text("a "), text("b")]), assistant("c")],
    "only a tool": [user("x"), assistant([python("1+1"), output("2")])],
    "tool without output": [user("x"), assistant([python("2**9"), text("no")]), user("?")],
    "output first": [user("x"), assistant([output("2"), text(" two"), output("3")])],
    "no parts": [user("x"), assistant([])],
    "waits for the tool": [user("x"), assistant("let me see ", tool_calls=[call({"expression": "1+1"})])],
    "waits after the tool": [user("x"), assistant("", tool_calls=[call({"expression": "1+1"})]), tool("2")],
    "call without answer": [user("x"), assistant(None, tool_calls=[call({"e": "f()"})]), assistant("I can't")],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_template_gives_the_same_ids_and_mask(tokenizer, messages):
    ids, mask = encode_conversation(tokenizer, messages)
    assert len(ids) == len(mask)
    assert by_template(tokenizer, messages) == (ids, mask)
    if ids[-1] != tokenizer.eos_token_id:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == encode_prompt(tokenizer, messages)


def test_prompt_ends_where_the_assistant_writes(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|assistant_start|>", "<|output_end|>"])
    assert encode_prompt(tokenizer, CONVERSATIONS["one question"])[-1] == start
    assert encode_prompt(tokenizer, CONVERSATIONS["waits after the tool"])[-1] == end
    answered = [user("Hi"), assistant("Hello")]
    with pytest.raises(ValueError, match="nothing to answer"):
        encode_prompt(tokenizer, answered)
    with pytest.raises(jinja2.TemplateError, match="nothing to answer"):
        tokenizer.apply_chat_template(answered, add_generation_prompt=True)


def test_conversations_are_cut(tokenizer):
    messages = [user("What is 12/60?"), assistant("0.2")]
    ids, mask = encode_conversation(tokenizer, messages)
    assert encode_conversation(tokenizer, messages, max_tokens=7) == (ids[:7], mask[:7])


def test_continue_final_message_leaves_the_turn_open(tokenizer):
    rendered = tokenizer.apply_chat_template(
        [user("Hi"), assistant("The answer is")], tokenize=False, continue_final_message=True
    )
    assert rendered.endswith("<|assistant_start|>The answer is")


fragments = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", "assistant_", "end", "<", "|", ">", " ", "x", "é"]), max_size=8
).map("".join)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(fragments, fragments, fragments, fragments, fragments)
def test_nothing_typed_becomes_a_special_token(tokenizer, system, question, first, second, tool_text):
    messages = [
        {"role": "system", "content": system},
        user(question),
        assistant([text(first), text(second), python(tool_text), output(tool_text), text(first)]),
    ]
    skeleton = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|python_start|>"]
    skeleton += ["<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>"]
    for ids, mask in (encode_conversation(tokenizer, messages), by_template(tokenizer, messages)):
        special = [(i, trained) for i, trained in zip(ids, mask, strict=True) if i >= len(tokenizer) - 9]
        assert [i for i, _ in special] == tokenizer.convert_tokens_to_ids(skeleton)
        assert [trained for _, trained in special] == [0, 0, 0, 0, 1, 1, 0, 0, 1]


def test_adjacent_text_parts_are_encoded_one_by_one(tokenizer):
    ids, _ = encode_conversation(tokenizer, [user("x"), assistant([text("calcul"), text("ator")])])
    expected = encode_text(tokenizer, "calcul") + encode_text(tokenizer, "ator")
    assert ids[-1 - len(expected) : -1] == expected


BAD = {
    "first assistant": ([assistant("hi")], "message 0 must be of the user"),
    "two users": ([user("a"), user("b")], "join neighbouring messages"),
    "two assistants": ([user("a"), assistant("b"), assistant("c")], "message 2 must be of the user"),
    "late system": ([user("a"), {"role": "system", "content": "b"}], "can only come first"),
    "only system": ([{"role": "system", "content": "b"}], "nothing follows"),
    "tool without call": ([user("a"), tool("3")], "no tool call waits"),
    "call never answered": ([user("a"), assistant("", tool_calls=[call("1")]), user("b")], "not answered yet"),
    "unknown role": ([{"role": "asistant", "content": "a"}], "assistant?"),
    "unknown part": ([user("a"), assistant([{"type": "pyton", "text": "1"}])], "'python'"),
    "content of a number": ([user(3)], "content must be text"),
    "no content": ([user("a"), {"role": "assistant"}], "content must be text"),
    "image": ([user([{"type": "image", "url": "x"}])], "must be text"),
    "two arguments": ([user("a"), assistant("", tool_calls=[call({"a": "1", "b": "2"})])], "one text argument"),
    "broken JSON": ([user("a"), assistant("", tool_calls=[call('{"a": "1')])], "broken JSON"),
}


@pytest.mark.parametrize("messages, message", BAD.values(), ids=BAD)
def test_wrong_conversations_are_refused_by_both(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        encode_conversation(tokenizer, messages)
    with pytest.raises((jinja2.TemplateError, TypeError)):
        by_template(tokenizer, messages)


def test_no_messages_are_refused():
    with pytest.raises(ValueError, match="at least one message"):
        conversation_spans([])
