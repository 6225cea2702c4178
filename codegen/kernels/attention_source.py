"""Triton source of split-KV decode attention, one readable module for each variant.

The templates below have a margin, see :func:`fxopt.codegen.source.fill`. Names in it:

vector   one query row behind each KV head: sums instead of matrix products; tile: several rows, a tile of them
shared   one mask row for all query rows of a batch row; own: each query row has its own
pad_d    the number of channels is no power of two (pad_dv: of the value)
gather   a list says what is read, by positions or by blocks of them; counted: a tensor says how long it is

Method: FlashDecoding (one program per KV head and split of the cache; a second kernel sums the splits) with the unified
maximum of FlashDecoding++ (arXiv 2311.01282): a constant phi subtracted instead of the row maximum leaves softmax as it
is, so numerators and denominators of all splits are plain sums.
"""

from __future__ import annotations

PREAMBLE = '''\
"""Split-KV decode attention. Scores and maxima are in units of log 2, as exp2 wants them."""

import triton
import triton.language as tl

'''

SPLIT = """
                 | @triton.jit(do_not_specialize=[$unspecialized])
                 | def $symbol(
                 |     query,  # [B, Hq, T, D]
                 |     key,  # [B, Hkv, S, D]
                 |     value,  # [B, Hkv, S, DV]
                 |     numerator,  # [B, Hkv, splits, R, DV], R = G * T query rows of one KV head
                 |     denominator,  # [B, Hkv, splits, R]
                 |     maximum,  # [B, Hkv, splits, R]
async            |     phi,  # [B, Hkv, R], the unified maximum; mostly the same for all of a KV head
recompute        |     flags,  # [B, Hkv, R], nonzero where the unified maximum did not fit
mask             |     mask,  # [B, Hq, T, S]
alibi            |     slopes,  # [Hq]
extent           |     extent,  # [B], number of filled cache positions
gather           |     index,  # [B, Hkv, K], the $UNITS to read, -1: none
counted          |     valid,  # [B, Hkv], entries of a list that count, the first ones
                 |     scale,
                 |     length,  # S
                 |     splits,
                 |     kv_heads,
gather           |     count,  # K
gather           |     least,  # with at most so many filled positions all of them are read
some_whole       |     whole_heads,  # a bit for each KV head that reads everything
gather           |     index_batch,
gather           |     index_head,
                 |     query_batch,
                 |     query_head,
                 |     query_token,
                 |     query_dim,
                 |     key_batch,
                 |     key_head,
                 |     key_position,
                 |     key_dim,
                 |     value_batch,
                 |     value_head,
                 |     value_position,
                 |     value_dim,
async            |     phi_batch,
async            |     phi_head,
async            |     phi_row,
mask             |     mask_batch,
mask own         |     mask_head,
mask own         |     mask_token,
mask             |     mask_position,
                 | ):
                 |     G: tl.constexpr = $G  # query heads per KV head
                 |     T: tl.constexpr = $T  # query tokens
                 |     D: tl.constexpr = $D  # channels of query and key
                 |     DV: tl.constexpr = $DV  # channels of value
                 |     R: tl.constexpr = $R  # query rows, all of one KV head
                 |     SPLIT: tl.constexpr = $SPLIT  # cache positions of one program
                 |     BM: tl.constexpr = $BM
                 |     BN: tl.constexpr = $BN
                 |     BD: tl.constexpr = $BD
                 |     BDV: tl.constexpr = $BDV
                 |     LOG2E: tl.constexpr = 1.4426950408889634
                 |
                 |     pair = tl.program_id(0)
                 |     split = tl.program_id(1)
                 |     batch = (pair // kv_heads).to(tl.int64)
                 |     head = (pair % kv_heads).to(tl.int64)
tile             |     row = $tile_origin + tl.arange(0, BM)
tile             |     group = row // T
tile             |     token = row % T
tile             |     in_rows = row < R
recompute tile   |     flagged = tl.load(flags + pair.to(tl.int64) * R + row, mask=in_rows, other=0)
recompute tile   |     if tl.max(flagged, 0) == 0:
recompute vector |     if tl.load(flags + pair) == 0:
recompute        |         return
extent           |     end = tl.maximum(tl.minimum(tl.load(extent + batch), length), 0).to(tl.int32)
!extent          |     end = length
gather           |     # A short cache is read whole and in order, its list is not looked at; the device decides.
gather           |     whole = end <= least
some_whole       |     whole = whole | (((whole_heads >> head) & 1) != 0)
counted          |     listed = tl.minimum(tl.load(valid + pair).to(tl.int32), count)
gather counted   |     stop = tl.where(whole, end, listed * $BLOCK)
gather !counted  |     stop = tl.where(whole, end, count * $BLOCK)
!gather          |     stop = end
                 |     first = split * SPLIT
                 |     last = tl.minimum(first + SPLIT, stop)
gather           |     asked = tl.where(whole, 0, last)  # where the list ends that has to be looked at
                 |     if first >= stop:
                 |         return
window           |     # No query token sees further back than the first one does.
window           |     if last <= end - T - $WINDOW + 1:
window           |         return
                 |
                 |     n = tl.arange(0, BN)
                 |     d = tl.arange(0, BD)
                 |     dv = tl.arange(0, BDV)
vector           |     q_at = query + batch * query_batch + head * query_head + d * query_dim
tile             |     q_at = query + batch * query_batch + (head * G + group)[:, None] * query_head
tile             |     q_at += token[:, None] * query_token + d[None, :] * query_dim
vector !pad_d    |     q = tl.load(q_at).to(tl.float32)  # [BD]
vector pad_d     |     q = tl.load(q_at, mask=d < D, other=0.0).to(tl.float32)  # [BD]
tile !pad_d      |     q = tl.load(q_at, mask=in_rows[:, None], other=0.0)  # [BM, BD]
tile pad_d       |     q = tl.load(q_at, mask=in_rows[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
!gather          |     # Offsets within a tile do not change; only a scalar moves along the cache.
                 |     k_at = key + batch * key_batch + head * key_head
                 |     v_at = value + batch * value_batch + head * value_head
!gather          |     k_at += n.to(tl.int64)[:, None] * key_position + d[None, :] * key_dim  # [BN, BD]
!gather          |     v_at += n.to(tl.int64)[:, None] * value_position + dv[None, :] * value_dim  # [BN, BDV]
gather           |     k_at += d[None, :] * key_dim  # [1, BD]
gather           |     v_at += dv[None, :] * value_dim  # [1, BDV]
gather           |     index_at = index + batch * index_batch + head * index_head
mask             |     mask_at = mask + batch * mask_batch
mask own tile    |     mask_at += (head * G + group)[:, None] * mask_head + token[:, None] * mask_token  # [BM, 1]
mask own vector  |     mask_at += head * mask_head
mask !gather     |     mask_at += n$MASK_KEY * mask_position
position tile    |     position = end - T + token  # [BM]
position vector  |     position = end - 1
alibi tile       |     slope = tl.load(slopes + head * G + group, mask=in_rows, other=0.0).to(tl.float32) * LOG2E
alibi vector     |     slope = tl.load(slopes + head).to(tl.float32) * LOG2E
async tile       |     phi_at = phi + batch * phi_batch + head * phi_head + row * phi_row
async tile       |     unified = tl.load(phi_at, mask=in_rows, other=0.0) * LOG2E  # [BM]
async vector     |     unified = tl.load(phi + batch * phi_batch + head * phi_head) * LOG2E
                 |
async            |     # Kept elementwise: the loop has no reduction across threads, and one follows it.
async tile       |     weights = tl.zeros([BM, BN], tl.float32)
async tile       |     highest = tl.full([BM, BN], float("-inf"), tl.float32)
async vector     |     weights = tl.zeros([BN], tl.float32)
async vector     |     highest = tl.full([BN], float("-inf"), tl.float32)
online tile      |     total = tl.zeros([BM], tl.float32)
online tile      |     top = tl.full([BM], float("-inf"), tl.float32)
online vector    |     total = 0.0
online vector    |     top = float("-inf")
tile             |     result = tl.zeros([BM, BDV], tl.float32)
vector           |     # Summed over positions after the loop.
vector           |     result = tl.zeros([BN, BDV], tl.float32)
                 |     for start in tl.range(first, last, BN, num_stages=$STAGES):
!gather          |         at = tl.cast(start, tl.int64)
!gather          |         live = start + n < last
gather           |         entry = start + n
gather           |         at = tl.load(index_at + entry$PER_BLOCK, mask=entry < asked, other=-1)
gather blocks    |         at = at * $BLOCK + entry % $BLOCK
gather           |         at = tl.where(whole, entry, at)
gather           |         live = (entry < last) & (at >= 0) & (at < end)
gather           |         at = tl.where(live, at, 0).to(tl.int64)  # [BN]
!pad_d           |         k = tl.load(k_at + $AT * key_position, mask=live[:, None], other=0.0)
pad_d            |         k = tl.load(k_at + $AT * key_position, mask=live[:, None] & (d < D)[None, :], other=0.0)
tile             |         s = tl.dot(q, tl.trans(k)$precision)  # [BM, BN]
vector           |         s = tl.sum(q[None, :] * k.to(tl.float32), 1)  # [BN]
soft_cap         |         # tanh(x) = 1 - 2 / (exp(2 x) + 1)
soft_cap         |         s = tl.exp2(s * (scale * $TWICE_LOG2E_BY_CAP))
soft_cap         |         s = $CAP_LOG2E - $TWICE_CAP_LOG2E / (s + 1.0)
!soft_cap        |         s = s * (scale * LOG2E)
alibi            |         s += slope$ROW * (start + n$KEY - position$ROW)
bool shared      |         visible = tl.load(mask_at + $M_AT * mask_position, mask=live, other=0) != 0
bool shared      |         s = tl.where(visible$KEY, s, float("-inf"))
bool own         |         visible = tl.load(mask_at + $M_AT * mask_position, mask=$mask_live, other=0) != 0
bool own         |         s = tl.where(visible, s, float("-inf"))
additive shared  |         bias = tl.load(mask_at + $M_AT * mask_position, mask=live, other=0.0).to(tl.float32)
additive own     |         bias = tl.load(mask_at + $M_AT * mask_position, mask=$mask_live, other=0.0).to(tl.float32)
additive         |         # The lowest finite number stays finite: a row of it is uniform, a row of -inf empty.
additive         |         bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, -3.0e38))
additive shared  |         s += bias$KEY
additive own     |         s += bias
causal           |         s = tl.where(start + n$KEY <= position$ROW, s, float("-inf"))
window           |         s = tl.where(start + n$KEY > position$ROW - $WINDOW, s, float("-inf"))
                 |         s = tl.where(live$KEY, s, float("-inf"))
!pad_dv          |         v = tl.load(v_at + $AT * value_position, mask=live[:, None], other=0.0)
pad_dv           |         v = tl.load(v_at + $AT * value_position, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
async            |         p = tl.exp2(s - unified$ROW)
async            |         weights += p
async            |         highest = tl.maximum(highest, s)
online           |         new_top = tl.maximum(top, tl.max(s, $AXIS))
online           |         # A row that has seen nothing but masked keys has no maximum to subtract.
online           |         shift = tl.where(new_top == float("-inf"), 0.0, new_top)
online           |         decay = tl.exp2(top - shift)
online           |         p = tl.exp2(s - shift$ROW)
online           |         total = total * decay + tl.sum(p, $AXIS)
online           |         top = new_top
online           |         result = result * decay$ROW
tile             |         result = tl.dot(p.to(v.dtype), v, result$precision)
vector           |         result += p[:, None] * v.to(tl.float32)
                 |
                 |     part = (pair.to(tl.int64) * splits + split) * R
async            |     total = tl.sum(weights, $AXIS)
async            |     top = tl.max(highest, $AXIS)
tile             |     tl.store(denominator + part + row, total, mask=in_rows)
tile             |     tl.store(maximum + part + row, top, mask=in_rows)
tile             |     numerator_at = numerator + (part + row)[:, None] * DV + dv[None, :]
tile !pad_dv     |     tl.store(numerator_at, result, mask=in_rows[:, None])
tile pad_dv      |     tl.store(numerator_at, result, mask=in_rows[:, None] & (dv < DV)[None, :])
vector           |     tl.store(denominator + part, total)
vector           |     tl.store(maximum + part, top)
vector !pad_dv   |     tl.store(numerator + part * DV + dv, tl.sum(result, 0))
vector pad_dv    |     tl.store(numerator + part * DV + dv, tl.sum(result, 0), mask=dv < DV)
"""

COMBINE = """
                 | @triton.jit(do_not_specialize=["length", "splits"$also_unspecialized])
                 | def $symbol(
                 |     numerator,  # [B, Hkv, splits, R, DV]
                 |     denominator,  # [B, Hkv, splits, R]
                 |     maximum,  # [B, Hkv, splits, R]
                 |     out,  # [B, Hq, T, DV], contiguous
async            |     phi,  # [B, Hkv, R]
checked          |     flags,  # [B, Hkv, R]
recompute        |     counter,  # [2]: rows recomputed, rows
sinks            |     sinks,  # [Hq]
extent           |     extent,  # [B]
counted          |     valid,  # [B, Hkv]
                 |     length,  # S
                 |     splits,
                 |     kv_heads,
gather           |     count,  # K
gather           |     least,
some_whole       |     whole_heads,
async            |     phi_batch,
async            |     phi_head,
async            |     phi_row,
recompute        |     rows,  # B * Hkv * R
                 | ):
                 |     G: tl.constexpr = $G
                 |     T: tl.constexpr = $T
                 |     DV: tl.constexpr = $DV
                 |     R: tl.constexpr = $R
                 |     SPLIT: tl.constexpr = $SPLIT
                 |     BDV: tl.constexpr = $BDV
                 |     LANES: tl.constexpr = $LANES
                 |     LOG2E: tl.constexpr = 1.4426950408889634
                 |
                 |     pair = tl.program_id(0)
                 |     row = tl.program_id(1)
                 |     batch = (pair // kv_heads).to(tl.int64)
                 |     head = pair % kv_heads
                 |     flat = pair.to(tl.int64) * R + row
recompute        |     # One program counts for all, so that no atomics are needed.
recompute        |     if (pair == 0) & (row == 0):
recompute        |         flagged = tl.zeros([1024], tl.int32)
recompute        |         for start in tl.range(0, rows, 1024):
recompute        |             at_row = start + tl.arange(0, 1024)
recompute        |             flagged += tl.load(flags + at_row, mask=at_row < rows, other=0)
recompute        |         tl.store(counter, tl.load(counter) + tl.sum(flagged, 0))
recompute        |         tl.store(counter + 1, tl.load(counter + 1) + rows)
recompute        |     if tl.load(flags + flat) == 0:
recompute        |         return
extent           |     end = tl.maximum(tl.minimum(tl.load(extent + batch), length), 0).to(tl.int32)
!extent          |     end = length
gather           |     # As many splits as the other kernel wrote.
gather           |     whole = end <= least
some_whole       |     whole = whole | (((whole_heads >> head) & 1) != 0)
counted          |     listed = tl.minimum(tl.load(valid + pair).to(tl.int32), count)
gather counted   |     stop = tl.where(whole, end, listed * $BLOCK)
gather !counted  |     stop = tl.where(whole, end, count * $BLOCK)
!gather          |     stop = end
                 |     used = (stop + SPLIT - 1) // SPLIT
window           |     oldest = tl.maximum(end - T - $WINDOW + 1, 0) // SPLIT
!window          |     oldest = 0
                 |     lane = tl.arange(0, LANES)
                 |     dv = tl.arange(0, BDV)
                 |     part = (pair.to(tl.int64) * splits + lane) * R + row
sinks            |     sink = tl.load(sinks + head * G + row // T).to(tl.float32) * LOG2E
async            |     unified = tl.load(phi + batch * phi_batch + head * phi_head + row * phi_row) * LOG2E
                 |
                 |     # Lane j sums the splits j, j + LANES, ...: a fixed order, whatever the number of splits.
                 |     tops = tl.full([LANES], float("-inf"), tl.float32)
online           |     for start in tl.range(oldest // LANES * LANES, used, LANES):
online           |         live = (start + lane >= oldest) & (start + lane < used)
online           |         at = tl.cast(start, tl.int64) * R
online           |         tops = tl.maximum(tops, tl.load(maximum + part + at, mask=live, other=float("-inf")))
online           |     top = tl.max(tops, 0)
online sinks     |     top = tl.maximum(top, sink)
online           |     shift = tl.where(top == float("-inf"), 0.0, top)
                 |     totals = tl.zeros([LANES], tl.float32)
                 |     results = tl.zeros([LANES, BDV], tl.float32)
                 |     for start in tl.range(oldest // LANES * LANES, used, LANES, num_stages=2):
                 |         live = (start + lane >= oldest) & (start + lane < used)
                 |         at = tl.cast(start, tl.int64) * R
                 |         partial = tl.load(denominator + part + at, mask=live, other=0.0)
                 |         at_result = numerator + (part + at)[:, None] * DV + dv[None, :]
!pad_dv          |         partial_result = tl.load(at_result, mask=live[:, None], other=0.0)
pad_dv           |         partial_result = tl.load(at_result, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
async            |         tops = tl.maximum(tops, tl.load(maximum + part + at, mask=live, other=float("-inf")))
async            |         totals += partial
async            |         results += partial_result
online           |         factor = tl.exp2(tl.load(maximum + part + at, mask=live, other=float("-inf")) - shift)
online           |         totals += partial * factor
online           |         results += partial_result * factor[:, None]
                 |     total = tl.sum(totals, 0)
                 |     result = tl.sum(results, 0)  # [BDV]
async            |     top = tl.max(tops, 0)
async            |     # Nothing unmasked is no reason to recompute; NaN scores, which no maximum shows, are.
async            |     empty = (top == float("-inf")) & (total == 0.0)
async sinks      |     top = tl.maximum(top, sink)
async sinks      |     total += tl.exp2(sink - unified)
online sinks     |     total += tl.exp2(sink - shift)
async            |     finite = tl.min((tl.abs(result) < float("inf")).to(tl.int32), 0) != 0
async            |     fits = (top - unified <= $UPPER) & (total >= $LOWER) & (total < float("inf")) & finite
async            |     tl.store(flags + flat, tl.where(fits | empty, 0, 1))
                 |     # A row with nothing to attend to is zero, as in scaled_dot_product_attention.
                 |     result = result / tl.where(total == 0.0, 1.0, total)
!pad_dv          |     tl.store(out + flat * DV + dv, result.to(out.dtype.element_ty))
pad_dv           |     tl.store(out + flat * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
"""
