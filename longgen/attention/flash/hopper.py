"""FlashAttention-4's Hopper kernels, driven by our lists.

The arithmetic is that of `flash_attn.cute` (package flash-attn-4). What is ours is which tiles are
visited, by which program and in which order, because a static sparse pattern has other needs than
dense attention:

- forward: a query tile visits few key tiles, so its beginning and end weigh much. One program a
  multiprocessor runs through many query tiles and loads the next while it stores the last.
- backward: a program owns a key tile, and tiles that every later query sees (sinks, strides) take
  up to a hundred times as long as the others. Programs take their tile from a table that puts these
  first, and read their own short list.

Only this package imports flash_attn; pyproject.toml pins the version whose classes are used here.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longgen import pattern as pattern_module
from longgen.attention.flash.lists import (
    FULL_COUNT,
    FULL_LAST,
    FULL_TURN,
    HEAD,
    KEY_TILE,
    MASK_COUNT,
    MASK_START,
    ROW,
    WORK_FIELDS,
)
from longgen.attention.flash.plan import TILE_K, Mask
from longgen.errors import UsageError

# Read when the package is imported: compiled kernels are kept across processes.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault(
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longgen" / "kernels"),
)

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, pipeline
from cutlass.cute import FastDivmodDivisorV2
from flash_attn.cute import copy_utils, interface, utils
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.cache_utils import JITCache, get_jit_cache
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.mask import (
    AttentionMask,
    mask_r2p_lambda,
    r2p_bitmask_below,
    sm90_col_to_r2p_idx,
)
from flash_attn.cute.named_barrier import NamedBarrierFwd
from flash_attn.cute.tile_scheduler import SingleTileScheduler, StaticPersistentTileScheduler
from flash_attn.cute.utils import AuxData, scalar_to_ssa, ssa_to_scalar
from quack import layout_utils
from quack.compile_utils import make_fake_tensor

# CUTLASS says so of an argument of flash-attn-4's own calls, once for each kernel it compiles.
warnings.filterwarnings("ignore", message="Argument aux_data .*cannot be converted")

ARCH = 90
_TYPES = {torch.float16: cutlass.Float16, torch.bfloat16: cutlass.BFloat16}
# Head sizes are padded to this inside the kernels, and their fp32 sums with them.
_HEAD_STEP = 16


def _cache(name: str) -> JITCache:
    """Return a cache on disk that changes when our part of the kernels does."""
    own = (Path(__file__).with_name(name) for name in ("hopper.py", "lists.py", "plan.py"))
    sources = (*own, Path(str(pattern_module.__file__)))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return get_jit_cache(f"longgen_{name}_{digest[:16]}")


_FORWARD, _BACKWARD = _cache("forward"), _cache("backward")


class _Launch:
    """Stand for a kernel call that is launched on another grid than its maker computes."""

    def __init__(self, call: Any, programs: Any) -> None:
        self.call, self.programs = call, programs

    def launch(self, *, grid: Any, **settings: Any) -> Any:
        del grid
        return self.call.launch(grid=(self.programs, Int32(1), Int32(1)), **settings)


def _the(args: tuple[Any, ...], test: Callable[[Any], bool]) -> int:
    """Return the place of the only argument that passes a test."""
    places = [i for i, value in enumerate(args) if test(value)]
    if len(places) != 1:
        raise RuntimeError(
            f"flash_attn.cute passes {len(places)} such arguments where this version of longgen "
            "expects one: the installed flash-attn-4 isn't the one it was written for."
        )
    return places[0]


def _put(args: tuple[Any, ...], place: int, *values: Any) -> tuple[Any, ...]:
    return (*args[:place], *values, *args[place + len(values) :])


def _masked(args: tuple[Any, ...], mask: Callable[[AttentionMask], Any]) -> tuple[Any, ...]:
    """Put another mask in the place of the parent's."""
    place = _the(args, lambda x: isinstance(x, partial) and x.func is AttentionMask)
    create = args[place]
    return _put(args, place, lambda lengths: mask(create(lengths)))


# The place of Q's pipeline among the arguments of the forward kernel's consumers.
_Q_PIPELINE = 12


@dataclass(frozen=True)
class _ReleasedBefore:
    """Stand for a pipeline whose consumers have released it when the parent has them do so."""

    of: pipeline.PipelineAsync

    def consumer_wait_w_index_phase(self, *args: Any) -> None:
        self.of.consumer_wait_w_index_phase(*args)

    def consumer_release_w_index(self, index: int) -> None:
        pass


class _ByRow:
    """Stand for the mask of tiles whose keys lie in one block each.

    Of such a tile a query sees the keys up to itself, or nothing. So the pattern is asked once a
    row, about the tile's first key, instead of once a pair, and the row is cut by its length.
    """

    def __init__(self, mask: AttentionMask) -> None:
        self.mask = mask

    def apply_mask(
        self,
        acc_S: cute.Tensor,
        batch_idx: Int32,
        head_idx: Int32,
        m_block: Int32,
        n_block: Int32,
        thr_mma: cute.TiledMma,
        aux_data: AuxData,
        mask_mod: Callable[..., Any] | None = None,
        **unused: Any,
    ) -> None:
        if mask_mod is None:
            # Wholly visible: all its keys exist.
            return
        tile_m, tile_n = self.mask.tile_m, self.mask.tile_n
        lengths = self.mask.seqlen_info
        scores = layout_utils.reshape_acc_to_mn(acc_S)
        places = layout_utils.reshape_acc_to_mn(
            thr_mma.partition_C(cute.make_identity_tensor((tile_m, tile_n)))
        )
        first_key = n_block * tile_n
        # Rows behind the last query may see keys that don't exist; they aren't stored.
        shift = lengths.seqlen_k - lengths.seqlen_q
        for r in range(cute.size(places.shape[0])):
            query = places[r, 0][0] + m_block * tile_m
            numbers = (scalar_to_ssa(x, Int32) for x in (batch_idx, head_idx, query, first_key))
            seen = cutlass.Boolean(ssa_to_scalar(mask_mod(*numbers, lengths, aux_data.tensors)))
            limit = Int32(seen) * (query + shift + 1 - first_key) - places[0][1]
            limit = sm90_col_to_r2p_idx(limit)
            mask_r2p_lambda(scores[r, None], partial(r2p_bitmask_below, limit), rank1=True)


class PersistentForward(FlashAttentionForwardSm90):
    """The forward kernel with one program a multiprocessor, each going through many query tiles."""

    num_programs: int
    # Whether every key tile lies in one block.
    by_row: bool
    q_pipeline: Any
    # The parent sets these while it is traced: O leaves by each group of warps for itself.
    use_tma_O = property(lambda self: False, lambda self, value: None)
    num_epilogue_threads = property(lambda self: 128, lambda self, value: None)
    sQ_layout: Any

    def _get_shared_storage_cls(self) -> Any:
        # Room for O behind Q: the next tile's Q is loaded while this one's O is stored.
        q_layout = self.sQ_layout
        self.sQ_layout = cute.make_layout(cute.cosize(q_layout) + cute.cosize(self.sO_layout))
        storage = super()._get_shared_storage_cls()
        self.sQ_layout = q_layout
        return storage

    def kernel(self, *args: Any) -> _Launch:
        place = _the(args, lambda x: x is SingleTileScheduler)
        grid = args[place - 1]
        total = grid.num_block * grid.num_head * grid.num_batch
        params = StaticPersistentTileScheduler.Params(
            FastDivmodDivisorV2(grid.num_block), FastDivmodDivisorV2(grid.num_head), total
        )
        args = _put(args, place - 1, params, StaticPersistentTileScheduler)
        return _Launch(super().kernel(*args), cutlass.min(Int32(self.num_programs), total))

    @cute.jit
    def load(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        copy_q: cute.CopyAtom,
        copy_k: cute.CopyAtom,
        copy_v: cute.CopyAtom,
        pipeline_k: pipeline.PipelineAsync,
        pipeline_v: pipeline.PipelineAsync,
        pipeline_q: pipeline.PipelineAsync,
        unused_copy: Any,
        unused_pages: Any,
        lists: BlockSparseTensors,
        unused_info: Any,
        make_lengths: Callable[..., Any],
        make_scheduler: Callable[..., Any],
    ) -> None:
        """Load what the lists name, masked tiles first, each list from its end.

        The parent waits for Q's room before it loads the next query tile's keys; here the first of
        them are on their way while the last tile ends.
        """
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4 == 0:
            q_phase = Int32(1)
            state = pipeline.make_pipeline_state(
                pipeline.PipelineUserType.Producer, self.num_stages
            )
            scheduler = make_scheduler()
            work = scheduler.initial_work_tile_info()
            while work.is_valid_tile:
                m_block, head, row, _ = work.tile_idx
                lengths = make_lengths(row)
                key_head = head // self.qhead_per_kvhead
                q = lengths.offset_batch_Q(mQ, row, dim=3)[None, None, head]
                k = lengths.offset_batch_K(mK, row, dim=3)[None, None, key_head]
                v = lengths.offset_batch_K(mV, row, dim=3)[None, None, key_head]
                load_q, _, _ = copy_utils.tma_get_copy_fn(
                    copy_q,
                    0,
                    cute.make_layout(1),
                    cute.local_tile(q, (self.tile_m, self.tile_hdim), (m_block, 0)),
                    sQ,
                    single_stage=True,
                )
                load_k, _, _ = copy_utils.tma_get_copy_fn(
                    copy_k,
                    0,
                    cute.make_layout(1),
                    cute.local_tile(k, (self.tile_n, self.tile_hdim), (None, 0)),
                    sK,
                )
                load_v, _, _ = copy_utils.tma_get_copy_fn(
                    copy_v,
                    0,
                    cute.make_layout(1),
                    cute.local_tile(v, (self.tile_n, self.tile_hdimv), (None, 0)),
                    sV,
                )
                load_k = copy_utils.tma_producer_copy_fn(load_k, pipeline_k)
                load_v = copy_utils.tma_producer_copy_fn(load_v, pipeline_v)
                mask_count, full_count = (
                    lists.mask_block_cnt[row, head, m_block],
                    lists.full_block_cnt[row, head, m_block],
                )
                masked = lists.mask_block_idx[row, head, m_block, None]
                full = lists.full_block_idx[row, head, m_block, None]
                total = mask_count + full_count
                # There is one: lists of query tiles that see nothing name a tile to mask.
                tile = Int32(0)
                if mask_count > 0:
                    tile = masked[mask_count - 1]
                else:
                    tile = full[full_count - 1]
                pipeline_k.producer_acquire(state)
                load_k(src_idx=tile, producer_state=state)
                pipeline_q.producer_acquire_w_index_phase(0, q_phase)
                load_q(tma_bar_ptr=pipeline_q.sync_object_full.get_barrier(0))
                q_phase ^= 1
                for i in cutlass.range(1, total, unroll=1):
                    following = Int32(0)
                    if i < mask_count:
                        following = masked[mask_count - 1 - i]
                    else:
                        following = full[total - 1 - i]
                    before = state.clone()
                    state.advance()
                    pipeline_k.producer_acquire(state)
                    load_k(src_idx=following, producer_state=state)
                    pipeline_v.producer_acquire(before)
                    load_v(src_idx=tile, producer_state=before)
                    tile = following
                pipeline_v.producer_acquire(state)
                load_v(src_idx=tile, producer_state=state)
                state.advance()
                scheduler.advance_to_next_work()
                work = scheduler.get_current_work()
            pipeline_v.producer_tail(state)

    def mma(self, *args: Any) -> None:
        self.q_pipeline = args[_Q_PIPELINE]
        args = _put(args, _Q_PIPELINE, _ReleasedBefore(args[_Q_PIPELINE]))
        super().mma(*(_masked(args, _ByRow) if self.by_row else args))

    def last_half_block_overlap(self, *args: Any, **settings: Any) -> Any:
        # All products with Q are done; the parent would keep it for the last one with V.
        self.q_pipeline.consumer_release_w_index(0)
        return super().last_half_block_overlap(*args, **settings)

    @cute.jit
    def epilogue(
        self,
        acc_O: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        sO: cute.Tensor,
        lengths: Any,
        copy_o: cute.TiledCopy,
        unused_atom: Any,
        tiled_mma: cute.TiledMma,
        thread: Int32,
        m_block: Int32,
        head: Int32,
        row: Int32,
    ) -> None:
        """Store O and the log-sum-exp, each group of warps its own rows.

        The parent has all groups wait for each other, and the first for the copy engine: none could
        begin the next tile while another still ends this one.
        """
        group = cute.arch.make_warp_uniform(thread // self.num_epilogue_threads)
        barrier = max(NamedBarrierFwd) + 1 + group
        # Behind Q, where the next tile's is on its way.
        sO = cute.make_tensor(sO.iterator + self.tile_m * self.tile_hdim, sO.layout)
        # Nobody reads the last tile's rows any more.
        cute.arch.barrier(barrier_id=barrier, number_of_threads=self.num_epilogue_threads)
        rO = cute.make_fragment_like(acc_O, self.dtype)
        rO.store(acc_O.load().to(self.dtype))
        atom = utils.get_smem_store_atom(ARCH, self.dtype)
        to_shared = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(thread)
        cute.copy(atom, to_shared.retile(rO), to_shared.partition_D(sO))

        num_queries = lengths.seqlen_q
        gLSE = cute.local_tile(
            lengths.offset_batch_Q(mLSE, row, dim=2)[None, head], (self.tile_m,), (m_block,)
        )
        columns = cute.append(gLSE.layout, cute.make_layout((self.tile_hdimv,), stride=(0,)))
        own = tiled_mma.get_slice(thread)
        own_lse = layout_utils.reshape_acc_to_mn(
            own.partition_C(cute.make_tensor(gLSE.iterator, columns))
        )
        places = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
        place = layout_utils.reshape_acc_to_mn(own.partition_C(places))
        if place[0][1] == 0:
            for m in cutlass.range(cute.size(own_lse.shape[1]), unroll_full=True):
                if place[m, 0][0] < num_queries - m_block * self.tile_m:
                    own_lse[m, 0] = lse[m]

        cute.arch.barrier(barrier_id=barrier, number_of_threads=self.num_epilogue_threads)
        shape = (self.tile_m // self.num_wg_mma, self.tile_hdimv)
        block = m_block * self.num_wg_mma + group
        from_shared = copy_o.get_slice(thread % self.num_epilogue_threads)
        held = from_shared.partition_S(cute.local_tile(sO, shape, (group, 0)))
        rows = cute.make_fragment_like(held, self.dtype)
        cute.autovec_copy(held, rows)
        gO = cute.local_tile(
            lengths.offset_batch_Q(mO, row, dim=3)[None, None, head], shape, (block, 0)
        )
        target = from_shared.partition_D(gO)
        places = from_shared.partition_S(cute.make_identity_tensor(shape))
        in_head = utils.predicate_k(places, limit=mO.shape[1])
        for m in cutlass.range_constexpr(cute.size(rows.shape[1])):
            if places[0, m, 0][0] < num_queries - block * shape[0]:
                cute.copy(
                    copy_o,
                    rows[None, m, None],
                    target[None, m, None],
                    pred=in_head[None, m, None] if const_expr(self.check_hdim_v_oob) else None,
                )


class _Descending:
    """Stand for a list of consecutive tiles from the last down, computed instead of read.

    A read would stand between the program's iterations: each begins with its tile's number. The
    first `turn` tiles come last.
    """

    def __init__(self, last: Any, count: Any, turn: Any) -> None:
        self.last, self.count, self.turn = last, count, turn

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, tuple):
            return self
        place = at + self.turn
        return self.last - place + self.count * Int32(place >= self.count)


class _OnlyListed:
    """Stand for a mask that is only asked about tiles listed for it.

    The parent's asks in wholly visible tiles, too, whether their keys exist. They do.
    """

    def __init__(self, mask: Any) -> None:
        self.mask = mask

    def apply_mask(self, *args: Any, mask_mod: Any = None, **settings: Any) -> None:
        if mask_mod is not None:
            self.mask.apply_mask(*args, mask_mod=mask_mod, **settings)


class ListedBackward(FlashAttentionBackwardSm90):
    """The backward kernel with one program for each row of a work table."""

    def kernel(self, *args: Any) -> _Launch:
        lists = args[_the(args, lambda x: isinstance(x, BlockSparseTensors))]
        return _Launch(super().kernel(*args), cute.size(lists.mask_block_cnt.shape[0]))

    def _work(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give one of the program's roles its row of the table in place of the whole lists."""
        place = _the(args, lambda x: isinstance(x, BlockSparseTensors))
        table, index, *_ = args[place]
        row = table[cute.arch.block_idx()[0], None]
        # The parent looks lists up by batch row, head and tile: no stride leads anywhere else.
        nowhere = (0, 0, 0)

        def count(field: int) -> cute.Tensor:
            return cute.make_tensor(
                row.iterator + field, cute.make_layout((1, 1, 1), stride=nowhere)
            )

        masked = cute.make_tensor(
            index.iterator + row[MASK_START],
            cute.make_layout((1, 1, 1, 1 << 30), stride=(*nowhere, 1)),
        )
        own = BlockSparseTensors(
            count(MASK_COUNT),
            masked,
            count(FULL_COUNT),
            _Descending(row[FULL_LAST], row[FULL_COUNT], row[FULL_TURN]),
        )
        args = _put(args, place, own)
        place = _the(
            args, lambda x: isinstance(x, partial) and x.func is SingleTileScheduler.create
        )
        create = args[place]

        def scheduler() -> SingleTileScheduler:
            made = create()
            made._blk_coord = (row[KEY_TILE], row[HEAD], row[ROW])
            return made

        return _put(args, place, scheduler)

    def load(self, *args: Any) -> None:
        super().load(*self._work(args))

    def mma(self, *args: Any, is_dQ_wg: bool) -> None:
        super().mma(*self._work(_masked(args, _OnlyListed)), is_dQ_wg=is_dQ_wg)

    def dQaccum_store(self, *args: Any) -> None:
        super().dQaccum_store(*self._work(args))


def _mask_mod(mask: Mask) -> Callable[..., Any]:
    """Return the function that the kernels ask about the pairs of a tile."""
    pattern = mask.pattern
    rest = replace(pattern, stride_blocks=0, head_shift=0)

    def visible(q: Any, k: Any, head: Any) -> Any:
        seen = pattern.visible(q, k, head)
        return seen & (rest.visible(q, k) == 0) if mask.only_strided else seen

    def plain(batch: Any, head: Any, q: Any, k: Any, lengths: Any, places: Any) -> Any:
        shift = lengths.seqlen_k - lengths.seqlen_q
        return visible(q + shift, k, head // mask.group + mask.head_offset)

    def placed(batch: Any, head: Any, q: Any, k: Any, lengths: Any, places: Any) -> Any:
        key_head = head // mask.group
        if mask.query_rows:
            q = q + batch * lengths.seqlen_q
        if mask.key_heads > 1:
            k = k + key_head * lengths.seqlen_k
        if mask.key_rows:
            k = k + batch * (lengths.seqlen_k * mask.key_heads)
        q_document, q_position, k_document, k_position = (
            scalar_to_ssa(place[at[0]], Int32)
            for place, at in zip(places, (q, q, k, k), strict=True)
        )
        same = (q_document == k_document) & (q_document >= 0)
        return same & visible(q_position, k_position, key_head + mask.head_offset)

    return placed if mask.by_places else plain


class _Shapes(NamedTuple):
    """Tensors of any size for the compiler."""

    element: Any

    def of(self, *sizes: Any, dtype: Any = None, align: int = 16) -> Any:
        dtype = dtype or self.element
        return make_fake_tensor(dtype, sizes, divisibility=max(align * 8 // dtype.width, 1))

    def places(self, mask: Mask) -> AuxData:
        if not mask.by_places:
            return AuxData()
        return AuxData([self.of(cute.sym_int(), dtype=Int32, align=4) for _ in range(4)])


def _compile(kernel: Any, *args: Any) -> Any:
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *args, stream, options="--enable-tvm-ffi")


def _forward_tile(head_dim: int) -> Any:
    return interface._tile_size_fwd_sm90(head_dim, head_dim, True, False)


def _backward_tile(head_dim: int) -> Any:
    return interface._tile_size_bwd_sm90(head_dim, head_dim, True, False)


def tiles_q(head_dim: int) -> tuple[int, int]:
    """Return the query tiles of the forward and the backward kernel."""
    return _forward_tile(head_dim).m_block_size, _backward_tile(head_dim).m_block_size


def _compile_forward(
    dtype: torch.dtype, head_dim: int, mask: Mask, tile_k: int, num_programs: int
) -> Any:
    tile = _forward_tile(head_dim)
    # The loop that ends in `last_half_block_overlap`.
    assert tile.intra_wg_overlap
    kernel = PersistentForward(
        _TYPES[dtype],
        head_dim,
        head_dim,
        mask.group,
        is_causal=False,
        is_local=False,
        pack_gqa=False,
        tile_m=tile.m_block_size,
        tile_n=tile_k,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=tile.intra_wg_overlap,
        mma_pv_is_rs=tile.mma_pv_is_rs,
        mask_mod=_mask_mod(mask),
        score_mod=None,
        has_aux_tensors=mask.by_places,
        q_subtile_factor=1,
        paged_kv_non_tma=False,
    )
    kernel.num_programs = num_programs
    kernel.by_row = mask.is_by_row(tile_k)
    b, t, s, h, hkv, d, n = (cute.sym_int() for _ in range(7))
    shapes = _Shapes(_TYPES[dtype])
    integers = partial(shapes.of, dtype=Int32, align=4)
    lists = BlockSparseTensors(
        integers(b, h, n),
        integers(b, h, n, cute.sym_int()),
        integers(b, h, n),
        integers(b, h, n, cute.sym_int()),
    )
    q, k, v, out = (
        shapes.of(*x) for x in ((b, t, h, d), (b, s, hkv, d), (b, s, hkv, d), (b, t, h, d))
    )
    lse = shapes.of(b, h, t, dtype=Float32, align=4)
    unused = [None] * 8
    return _compile(kernel, q, k, v, out, lse, 1.0, *unused, lists, shapes.places(mask), None, None)


def _compile_backward(dtype: torch.dtype, head_dim: int, mask: Mask) -> Any:
    tile = _backward_tile(head_dim)
    kernel = ListedBackward(
        _TYPES[dtype],
        head_dim,
        head_dim,
        mask.group,
        is_causal=False,
        is_local=False,
        deterministic=False,
        tile_m=tile.m_block_size,
        tile_n=tile.n_block_size,
        Q_stage=tile.num_stages_Q,
        dO_stage=tile.num_stages_dO,
        PdS_stage=tile.num_stages_PdS,
        SdP_swapAB=tile.SdP_swapAB,
        dKV_swapAB=tile.dKV_swapAB,
        dQ_swapAB=tile.dQ_swapAB,
        AtomLayoutMSdP=tile.AtomLayoutMSdP,
        AtomLayoutNdKV=tile.AtomLayoutNdKV,
        AtomLayoutMdQ=tile.AtomLayoutMdQ,
        num_threads=(tile.num_wg + 1) * 128,
        V_in_regs=False,
        mask_mod=_mask_mod(mask),
        has_aux_tensors=mask.by_places,
        q_subtile_factor=1,
        dQ_single_wg=tile.dQ_single_wg,
    )
    b, t, s, h, hkv, d, t_up = (cute.sym_int() for _ in range(7))
    shapes = _Shapes(_TYPES[dtype])
    sums = partial(shapes.of, dtype=Float32)
    q, k, v, grad = (
        shapes.of(*x) for x in ((b, t, h, d), (b, s, hkv, d), (b, s, hkv, d), (b, t, h, d))
    )
    if mask.group > 1:
        size = cute.sym_int()
        dk, dv = sums(b, hkv, size), sums(b, hkv, size)
    else:
        dk, dv = shapes.of(b, s, hkv, d), shapes.of(b, s, hkv, d)
    work = BlockSparseTensors(
        shapes.of(cute.sym_int(), WORK_FIELDS, dtype=Int32),
        shapes.of(cute.sym_int(), dtype=Int32, align=4),
    )
    stats = sums(b, h, t_up), sums(b, h, t_up)
    dq = sums(b, h, cute.sym_int())
    unused = [None] * 9
    return _compile(
        kernel, q, k, v, grad, *stats, dq, dk, dv, 1.0, *unused, shapes.places(mask), work, None
    )


def listed_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forward: list[torch.Tensor],
    mask: Mask,
    tile_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel over lists; returns out (B, T, H, D) and lse (B, H, T) in fp32."""
    batch, length, heads, head_dim = q.shape
    q, k, v = _ready(q, k, v)
    out = _empty_like(q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    key = (ARCH, q.dtype, head_dim, mask, tile_k, programs)
    if key not in _FORWARD:
        _FORWARD[key] = _compile_forward(*key[1:])
    lists = [x.expand(batch, heads, *x.shape[2:]) for x in forward[:4]]
    _FORWARD[key](
        *(q, k, v, out, lse, scale),
        *[None] * 8,
        (*lists, None, None, None, None),
        AuxData(forward[4:] or None, None),
        None,
        None,
    )
    return out, lse


class _Part(NamedTuple):
    """One launch of the backward kernel: its keys and values (B, S, Hkv, D), work, and results."""

    k: torch.Tensor
    v: torch.Tensor
    work: list[torch.Tensor]
    mask: Mask
    dk: torch.Tensor
    dv: torch.Tensor
    # What the kernel adds to where query heads share keys: fp32, in an order of its own.
    dk_sums: torch.Tensor | None
    dv_sums: torch.Tensor | None

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, work: list[torch.Tensor], mask: Mask) -> _Part:
        dk, dv = _empty_like(k), _empty_like(v)
        if mask.group == 1:
            return cls(k, v, work, mask, dk, dv, None, None)
        batch, length, heads, head_dim = k.shape
        size = _up(length, TILE_K) * _up(head_dim, _HEAD_STEP)
        sums = (
            torch.zeros(batch, heads, size, dtype=torch.float32, device=k.device) for _ in range(2)
        )
        return cls(k, v, work, mask, dk, dv, *sums)


def listed_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    backward: list[torch.Tensor],
    mask: Mask,
    strided: list[torch.Tensor],
    strided_mask: Mask | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernel over work tables; returns dq, dk, dv like q, k, v."""
    grad, q, k, v, out = _ready(grad, q, k, v, out)
    batch, length, heads, head_dim = q.shape
    tile = _backward_tile(head_dim)
    # All that kernels read is made before the first: they are launched before the one ahead of
    # them has ended, and wait only for what the kernel that prepares them wrote.
    parts = [_Part.of(k, v, backward, mask)]
    if strided_mask is not None:
        columns, *work = strided
        place = (
            torch.arange(batch, device=q.device)[:, None, None],
            columns.transpose(1, 2),
            torch.arange(k.shape[2], device=q.device)[None, None, :],
        )
        parts.append(_Part.of(k[place], v[place], work, strided_mask))
    # The kernel that prepares them strides over 128 rows at a time where a head is 5 x 16 wide, and
    # would write behind a smaller tile.
    prepared = tile.m_block_size if _up(head_dim, _HEAD_STEP) % 32 == 0 else 128
    rows = _up(length, prepared)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    dq_sums = torch.empty(batch, heads, rows * _up(head_dim, _HEAD_STEP), **floats)
    products, lse_log2 = (torch.empty(batch, heads, rows, **floats) for _ in range(2))
    # Rows of grad . out (less the gradient of lse), lse by the logarithm to base 2, and zeros.
    interface._bwd_preprocess(
        *(out, grad, products, lse, lse_log2, dq_sums, None, None),
        None if grad_lse is None else grad_lse.contiguous(),
        *(_TYPES[q.dtype], head_dim, head_dim, prepared),
        hdim_multiple_of=_HEAD_STEP,
        fake_mode=False,
    )
    for part in parts:
        key = (ARCH, q.dtype, head_dim, part.mask)
        if key not in _BACKWARD:
            _BACKWARD[key] = _compile_backward(*key[1:])
        shared = part.dk_sums is not None
        _BACKWARD[key](
            *(q, part.k, part.v, grad, lse_log2, products, dq_sums),
            *((part.dk_sums, part.dv_sums) if shared else (part.dk, part.dv)),
            scale,
            *[None] * 9,
            AuxData(part.work[2:] or None, None),
            (*part.work[:2], None, None, None, None, None, None),
            None,
        )

    def put(
        sums: torch.Tensor, target: torch.Tensor, factor: float, layout: tuple[Any, ...]
    ) -> None:
        interface._bwd_postprocess_convert(
            *(sums, target, factor, None, None, ARCH, _TYPES[q.dtype], head_dim, *layout),
            hdim_multiple_of=_HEAD_STEP,
            fake_mode=False,
        )

    threads = tile.num_wg * 128
    for part in parts:
        if part.dk_sums is not None and part.dv_sums is not None:
            layout = (TILE_K, threads, tile.AtomLayoutNdKV, tile.dKV_swapAB)
            put(part.dk_sums, part.dk, scale, layout)
            put(part.dv_sums, part.dv, 1.0, layout)
    dq = _empty_like(q)
    threads = 128 if tile.dQ_single_wg else threads
    put(dq_sums, dq, scale, (tile.m_block_size, threads, tile.AtomLayoutMdQ, tile.dQ_swapAB))
    dk, dv = parts[0].dk, parts[0].dv
    for part in parts[1:]:
        # Columns are unique but for padding, which adds zeros.
        dk.index_put_(place, part.dk, accumulate=True)
        dv.index_put_(place, part.dv, accumulate=True)
    return dq, dk, dv


def dense_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally to the last key, or within packed documents (T, H, D) of `cu_seqlens`.

    Returns out like q and lse (B, H, T), or (H, T) if packed.
    """
    out, lse, *_ = interface._flash_attn_fwd(
        *_ready(q, k, v),
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        return_lse=True,
    )
    return out, lse


def dense_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv of `dense_forward`."""
    if q.shape[-1] % 32:
        raise UsageError(
            f"flash-attn-4 computes wrong gradients of dense attention for heads of {q.shape[-1]}; "
            'ask for gradients when calling attention, or use impl="flex".'
        )
    dq, dk, dv = (_empty_like(x) for x in (q, k, v))
    interface._flash_attn_bwd(
        *_ready(q, k, v, out, grad),
        lse,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        dlse=None if grad_lse is None else grad_lse.contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like x, contiguous whatever x is."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _ready(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors whose rows the copy engine can read: aligned to 16 bytes, last stride 1."""

    def is_ready(x: torch.Tensor) -> bool:
        step = 16 // x.element_size()
        return (
            x.stride(-1) == 1
            and x.data_ptr() % 16 == 0
            and all(
                stride % step == 0 and (stride or size == 1)
                for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
            )
        )

    def made_ready(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    return tuple(x if is_ready(x) else made_ready(x) for x in tensors)
