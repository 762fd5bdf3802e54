"""Decoding over the paged cache: equal to the whole forward, whatever the batching and chunking."""

import pytest
import torch
from model_support import assert_close, hf_load, random_ours, tokens

from model import DeepseekConfig, generate
from model.cache import Sequence, TokenBatch
from model.config import YarnConfig
from model.generate import Stats
from model.sampling import Sampling, uniform

YARN = YarnConfig(original_max_position_embeddings=16)
V2_LITE = dict(
    model_type="deepseek_v2",
    scoring_func="softmax",
    norm_topk_prob=False,
    n_group=1,
    topk_group=1,
    q_lora_rank=None,
    num_nextn_predict_layers=0,
)


def cached_logits(model, rows, chunks, page_size=4):
    """Logits of every position of `rows`, fed in the given chunks through one shared cache."""
    cache = model.new_cache(sum(len(row) + page_size for row in rows), page_size=page_size)
    for pool in cache.pools:
        pool.fill_(float("nan"))  # what was never written must not be read
    sequences = [Sequence() for _ in rows]
    out = [[] for _ in rows]
    done = [0] * len(rows)
    for chunk in chunks:
        live = [i for i, row in enumerate(rows) if done[i] < len(row)]
        if not live:
            break
        counts = [min(chunk, len(rows[i]) - done[i]) for i in live]
        batch = TokenBatch(
            counts, [done[i] for i in live], "cpu", cache, [sequences[i] for i in live]
        )
        new = torch.cat([rows[i][done[i] : done[i] + n] for i, n in zip(live, counts)])
        with torch.no_grad():
            hidden = model.hidden_states(new, batch)
            pieces = model.lm_head(hidden).split(counts)
        for i, n, piece in zip(live, counts, pieces):
            out[i].append(piece)
            done[i] += n
    return [torch.cat(pieces) for pieces in out]


@pytest.mark.parametrize("changes", [{}, {"yarn": YARN}, V2_LITE], ids=["V3", "yarn", "V2-Lite"])
@pytest.mark.parametrize(
    "chunks",
    [[40], [1] * 37, [17, 1, 1, 5, 9, 20], [10, 12, 1, 1, 1, 30], [13, 3, 8, 40]],
    ids=lambda chunks: "-".join(map(str, chunks[:4])),
)
def test_cached_equals_whole_for_ragged_prompts(changes, chunks):
    model = random_ours(DeepseekConfig.tiny(**changes), seed=1)
    rows = [tokens(1, n, seed=n)[0] for n in (37, 5, 22, 1)]
    for row, logits in zip(rows, cached_logits(model, rows, chunks)):
        with torch.no_grad():
            assert_close(logits, model(row[None])[0])


def test_pages_out_of_order_and_reused():
    model = random_ours(seed=2)
    cache = model.new_cache(64, page_size=4)
    first, second = Sequence(), Sequence()
    cache.reserve(first, 20)
    cache.reserve(second, 9)
    cache.release(first)
    third = Sequence()
    cache.reserve(third, 33)
    assert sorted(third.pages + second.pages) != third.pages + second.pages
    assert not set(third.pages) & set(second.pages)
    ids = tokens(1, 33)[0]
    with torch.no_grad():
        hidden = model.hidden_states(ids, TokenBatch([33], [0], "cpu", cache, [third]))
        assert_close(model.lm_head(hidden), model(ids[None])[0])
    with pytest.raises(MemoryError, match=r"9 more pages needed, 4 of 16 free"):
        cache.reserve(first, 36)
    assert first.pages == [] and cache.num_free_pages == 4


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_never_changes_the_text(depth, temperature):
    # Two words only: even a random draft is right now and then.
    config = DeepseekConfig.tiny(num_nextn_predict_layers=depth, vocab_size=2)
    model = random_ours(config, seed=depth)
    prompts = [tokens(1, n, seed=n, vocab=2)[0].tolist() for n in (1, 2, 9, 30)]
    options = dict(max_new_tokens=25, temperature=temperature, eos_token_id=None, page_size=4)
    plain = model.generate(prompts, **options)
    fast = model.generate(prompts, use_mtp=True, chunk_size=7, **options)
    assert fast.tokens == plain.tokens
    assert all(len(row) == 25 for row in plain.tokens)
    assert plain.stats.drafted == []
    assert 0 < sum(fast.stats.accepted) < sum(fast.stats.drafted)


@pytest.mark.parametrize("depth, vocab", [(1, 2), (3, 2), (2, 131)])
def test_drafts_are_those_of_the_training_forward(depth, vocab, monkeypatch):
    """Every draft of a run, whatever was accepted before it, against a forward from scratch."""
    config = DeepseekConfig.tiny(num_nextn_predict_layers=depth, vocab_size=vocab)
    model = random_ours(config, seed=depth)
    checked = []
    draft = generate._Engine._draft

    def check(engine, running):
        draft(engine, running)
        for s in running:
            for k, token in enumerate(s.drafts):
                known = torch.tensor([s.tokens + s.drafts[:k]])
                if known.shape[1] > depth:
                    logits = model.forward_train(known).mtp_logits[k][0, -1]
                    margin = logits.max() - logits[token]
                    assert margin < 1e-4, (len(s.tokens), k)
                    checked.append(k)

    monkeypatch.setattr(generate._Engine, "_draft", check)
    prompts = [tokens(1, n, seed=n, vocab=vocab)[0].tolist() for n in (1, 9)]
    model.generate(prompts, max_new_tokens=8, use_mtp=True, chunk_size=4, eos_token_id=None)
    assert set(checked) == set(range(depth))


def test_drafts_that_agree_are_kept():
    """MTP modules made to echo the main model: every draft is right, two tokens come per step."""
    model = random_ours(DeepseekConfig.tiny(yarn=None), seed=5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("o_proj.weight", "w2.weight", "down_proj.weight")):
                value.zero_()  # blocks do nothing: the next token depends on the current one only
        d = model.config.hidden_size
        model.norm.weight.fill_(1.0)
        module = model.mtp[0]
        for norm in (module.enorm, module.hnorm, module.norm):
            norm.weight.fill_(1.0)
        module.eh_proj.weight.zero_()
        module.eh_proj.weight[:, :d] = torch.eye(d)  # the embedding alone: what the model sees
    prompts = tokens(2, 6)
    plain = model.generate(prompts, max_new_tokens=21, eos_token_id=None)
    fast = model.generate(prompts, max_new_tokens=21, eos_token_id=None, use_mtp=True)
    assert fast.tokens == plain.tokens
    assert fast.stats.acceptance == [1.0]
    assert fast.stats.decode_steps == 10 and plain.stats.decode_steps == 20


def test_mtp_cache_equals_the_training_forward():
    """Drafts come from the logits that training sees: position by position, through the cache."""
    model = random_ours(DeepseekConfig.tiny(num_nextn_predict_layers=2), seed=6)
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = model.forward_train(ids).mtp_logits
        cache = model.new_cache(32, page_size=4)
        pages = Sequence()
        states = []
        for start, count in ((0, 12), (12, 1), (13, 3), (16, 4)):
            batch = TokenBatch([count], [start], "cpu", cache, [pages])
            states.append(model.hidden_states(ids[0, start : start + count], batch))
        hidden = torch.cat(states)
        for k, logits in enumerate(expected, start=1):
            pieces = []
            for start, end in ((0, 11), (11, 13), (13, 20 - k)):
                batch = TokenBatch([end - start], [start], "cpu", cache, [pages])
                following = ids[0, start + k : end + k]
                pieces.append(model.mtp_hidden_states(k, hidden[start:end], following, batch))
            hidden = torch.cat(pieces)
            assert_close(model.lm_head(hidden), logits[0])


def test_greedy_equals_transformers(tmp_path):
    model = random_ours(DeepseekConfig.tiny(yarn=YARN), seed=7)
    model.save_pretrained(tmp_path / "ckpt")
    theirs = hf_load(tmp_path / "ckpt")
    ids = tokens(2, 11)
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    ours = model.generate(ids, max_new_tokens=24, eos_token_id=None, use_mtp=True)
    assert ours.tokens == expected[:, 11:].tolist()


def test_text_does_not_depend_on_batching_or_chunks():
    model = random_ours(seed=8)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 40, 12)]
    options = dict(max_new_tokens=12, temperature=0.9, top_p=0.8, seed=5, eos_token_id=None)
    together = model.generate(prompts, chunk_size=5, page_size=3, **options).tokens
    assert together == model.generate(prompts, **options).tokens
    assert together[0] == model.generate(prompts[:1], **options).tokens[0]
    assert together != model.generate(prompts, **{**options, "seed": 6}).tokens


def test_streaming_and_the_end_token():
    model = random_ours(seed=9)
    whole = model.generate([[5, 6]], max_new_tokens=10, eos_token_id=None).tokens[0]
    end = whole[4]
    stats = Stats()
    pieces = list(model.stream([[5, 6]], max_new_tokens=10, eos_token_id=end, stats=stats))
    streamed = [token for index, piece in pieces for token in piece if index == 0]
    assert streamed == whole[: whole.index(end) + 1]
    assert len(pieces) > 1 and stats.prompt_tokens == 2


def test_fp8_cache_is_close():
    config = DeepseekConfig.tiny(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=2)
    model = random_ours(config, seed=10)
    ids = tokens(1, 24)[0]
    cache = model.new_cache(24, dtype="fp8", page_size=8)
    assert cache.pools[0].shape == (3, 8, 656)
    pages, states = Sequence(), []
    with torch.no_grad():
        for start, count in ((0, 12), (12, 10), (22, 2)):
            batch = TokenBatch([count], [start], "cpu", cache, [pages])
            states.append(model.hidden_states(ids[start : start + count], batch))
        logits = model.lm_head(torch.cat(states))
        expected = model(ids[None])[0]
    error = (logits - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match="kv_lora_rank 512"):
        random_ours().new_cache(8, dtype="fp8")


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    sampling = Sampling(temperature=0.7, seed=3)
    n = 20000
    picked = sampling.pick(logits.expand(n, -1), [(0, i) for i in range(n)])
    share = torch.bincount(torch.tensor(picked), minlength=5) / n
    expected = torch.softmax(logits / 0.7, -1)
    assert (share - expected).abs().max() < 4 * 0.5 / n**0.5
    nucleus = Sampling(temperature=0.7, top_p=0.8, seed=3)
    picked = torch.tensor(nucleus.pick(logits.expand(n, -1), [(0, i) for i in range(n)]))
    share = torch.bincount(picked, minlength=5) / n
    kept = torch.tensor([False, True, True, False, False])  # 0.16 + 0.69 reach 0.8
    assert share[~kept].sum() == 0
    assert (share[kept] - expected[kept] / expected[kept].sum()).abs().max() < 4 * 0.5 / n**0.5


def test_draws_are_independent():
    draws = torch.tensor(
        [[uniform(s, q, p) for p in range(200)] for s in (0, 1) for q in range(20)]
    )
    assert abs(draws.mean() - 0.5) < 4 / (12 * draws.numel()) ** 0.5
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.35


@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ([], {}, ValueError, "at least one"),
        ([[]], {}, ValueError, r"prompts\[0\]: empty"),
        ([[1], [131]], {}, IndexError, r"prompts\[1\]: expected tokens in 0\.\.130, got 131"),
        ([[-1]], {}, IndexError, "got -1"),
        ([[1.5]], {}, TypeError, "list of integers"),
        ([[1]], dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        ([[1]], dict(max_new_tokens=512), ValueError, "max_position_embeddings 512"),
        ([[1]], dict(temperature=-1.0), ValueError, "temperature"),
        ([[1]], dict(temperature=float("nan")), ValueError, "temperature"),
        ([[1]], dict(top_p=0.0), ValueError, "top_p"),
        ([[1]], dict(chunk_size=0), ValueError, "chunk_size"),
    ],
)
def test_bad_requests_are_refused(prompts, options, error, message):
    with pytest.raises(error, match=message):
        random_ours().generate(prompts, **options)


def test_bad_tokens_are_refused():
    model = random_ours()
    with pytest.raises(IndexError, match=r"expected tokens in 0\.\.130, got 131"):
        model(torch.tensor([[1, 131]]))
    with pytest.raises(IndexError, match="got -2"):
        model(torch.tensor([[-2, 3]]))
    with pytest.raises(ValueError, match=r"shape \[b, s\]"):
        model(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="int64 or int32"):
        model(torch.tensor([[1.0]]))
    with pytest.raises(ValueError, match="no MTP modules"):
        random_ours(DeepseekConfig.tiny(num_nextn_predict_layers=0)).generate([[1]], use_mtp=True)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        model.generate([[1]])
