"""The emulator of GPU code that kernels are tested with: it computes what it is told, and notices what is wrong."""

import re

import numpy as np
import pytest
from ptx.block import Block
from ptx.memory import GlobalMemory
from ptx.program import translate
from ptx.races import RaceError


def run(body, *arrays, threads=64, shared=0):
    """Runs one block. `%rd0`, `%rd1`, ... are the addresses of the arrays, `%r0` the thread."""
    parameters = "".join(f".param .u64 kernel_param_{n}," for n in range(len(arrays))).rstrip(",")
    loads = "".join(f"ld.param.b64 %rd{n}, [kernel_param_{n}];" for n in range(len(arrays)))
    text = (
        f".visible .entry kernel({parameters})\n.reqntid {threads}\n{{\nmov.u32 %r0, %tid.x;{loads}{body}\nret;\n}}\n"
    )
    memory = GlobalMemory()
    memory.allow({(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays})
    block = Block(threads, 0, [np.uint64(array.ctypes.data) for array in arrays], shared, memory)
    with np.errstate(all="ignore"):
        translate(text).run(block)


REVERSED = """
    shl.b32 %r1, %r0, 2; cvt.u64.u32 %rd2, %r1;
    add.s64 %rd3, %rd0, %rd2; ld.global.b32 {%r2}, [%rd3 + 0];
    st.shared.b32 [%r1 + 0], {%r2};
    bar.sync 0;
    sub.s32 %r3, 252, %r1; ld.shared.b32 %r4, [%r3];
    add.s64 %rd4, %rd1, %rd2; st.global.b32 [%rd4 + 0], {%r4};
"""


def test_warps_meet_in_shared_memory():
    source, target = np.random.rand(64).astype(np.float32), np.zeros(64, np.float32)
    run(REVERSED, source, target, shared=256)
    assert (target == source[::-1]).all()
    with pytest.raises(RaceError, match="reads what another one wrote"):
        run(REVERSED.replace("bar.sync 0;", ""), source, target, shared=256)
    again = REVERSED + "st.shared.b32 [%r1 + 0], {%r2};"
    with pytest.raises(RaceError, match="writes over what another one read"):
        run(again, source, target, shared=256)
    with pytest.raises(RaceError, match="different values to one place"):
        run(REVERSED.replace("[%r1 + 0]", "[%r5 + 0]"), source, target, shared=256)


def test_memory_that_is_not_the_kernels():
    source, target = np.zeros(65, np.float32), np.zeros(63, np.float32)
    with pytest.raises(MemoryError, match=r"4 bytes at .* are of no tensor"):
        run(REVERSED, source, target, shared=256)
    with pytest.raises(MemoryError, match="beyond the 252 bytes"):
        run(REVERSED, source, source, shared=252)
    with pytest.raises(MemoryError, match="not aligned"):
        run(REVERSED.replace("[%rd3 + 0]", "[%rd3 + 2]"), source, source, shared=256)


def test_a_copy_is_there_when_it_was_waited_for():
    body = """
        shl.b32 %r1, %r0, 4; cvt.u64.u32 %rd2, %r1; add.s64 %rd3, %rd0, %rd2;
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd3 + 0 ], 0x10, %r2;
        cp.async.commit_group;
        cp.async.wait_group 0x0;
        bar.sync 0;
        xor.b32 %r3, %r1, 16; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
        add.s64 %rd4, %rd1, %rd2; st.global.v4.b32 [%rd4 + 0], {%r4, %r5, %r6, %r7};
    """
    source, target = np.random.rand(64, 4).astype(np.float32), np.zeros((64, 4), np.float32)
    run("mov.b32 %r2, 16;" + body, source, target, shared=1024)
    assert (target.reshape(32, 2, 4) == source.reshape(32, 2, 4)[:, ::-1]).all()
    run("mov.b32 %r2, 0;" + body, source, target, shared=1024)
    assert (target == 0).all(), "nothing was to be read"
    run("mov.b32 %r2, 16;" + body.replace("wait_group 0x0", "wait_group 0x1"), source, target, shared=1024)
    assert np.isnan(target).all()


def test_threads_part_ways_and_meet():
    """Each adds 1 as often as its number says, up to 5; the first six then another 20."""
    body = """
        mov.b32 %r1, 0;
        $L__BB0_1:
        setp.ge.u32 %p1, %r1, %r0; setp.ge.u32 %p2, %r1, 5;
        @%p1 bra $L__BB0_2;
        @%p2 bra $L__BB0_3;
        add.s32 %r1, %r1, 1;
        bra.uni $L__BB0_1;
        $L__BB0_2:
        add.s32 %r1, %r1, 20;
        $L__BB0_3:
        shl.b32 %r2, %r0, 2; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd0, %rd2; st.global.b32 [%rd3 + 0], {%r1};
    """
    target = np.zeros(64, np.int32)
    run(body, target)
    assert (target == np.where(np.arange(64) <= 5, np.arange(64) + 20, 5)).all()
    target[:] = 0
    run(body.replace("%r1, 20;", "%r1, 20; bar.sync 0;").replace("$L__BB0_3:", "ret; $L__BB0_3: bar.sync 0;"), target)
    assert (target == np.where(np.arange(64) <= 5, 0, 5)).all(), "a barrier can be met at two places"


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=re.escape("kernel: dp4a.s32 ['%r1'] is unknown")):
        run("dp4a.s32 %r1;", np.zeros(1, np.float32))


# %r1 and %r2 to %r3, of each thread's element of two arrays and a third.
ELEMENTWISE = """
    shl.b32 %r8, %r0, 2; cvt.u64.u32 %rd8, %r8;
    add.s64 %rd3, %rd0, %rd8; ld.global.b32 {%r1}, [%rd3];
    add.s64 %rd4, %rd1, %rd8; ld.global.b32 {%r2}, [%rd4];
    INSTRUCTION
    add.s64 %rd5, %rd2, %rd8; st.global.b32 [%rd5], {%r3};
"""


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shr.s32 %r3, %r1, 2;", lambda a, b: a >> 2),
        ("shr.u32 %r3, %r1, 40;", lambda a, b: 0 * a),
        ("bfe.s32 %r3, %r1, 4, 5;", lambda a, b: ((a >> 4 & 31) ^ 16) - 16),
        ("bfe.u32 %r3, %r1, 4, 5;", lambda a, b: a >> 4 & 31),
        ("div.s32 %r3, %r1, 7;", lambda a, b: np.trunc(a / 7).astype(np.int32)),
        ("rem.s32 %r3, %r1, 7;", lambda a, b: np.fmod(a, 7)),
        ("mad.lo.s32 %r3, %r1, %r2, %r1;", lambda a, b: a * b + a),
        (
            "mul.wide.s32 %rd9, %r1, %r2; shr.s64 %rd9, %rd9, 3; cvt.u32.u64 %r3, %rd9;",
            lambda a, b: a * b.astype(int) >> 3,
        ),
        ("min.s32 %r3, %r1, %r2;", np.minimum),
        (
            "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1;",
            lambda a, b: np.where(a.astype(np.uint32) < b.astype(np.uint32), 1, 2),
        ),
        ("cvt.rn.f32.s32 %r3, %r1; cvt.rzi.s32.f32 %r3, %r3;", lambda a, b: a),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};", lambda a, b: a << 16 | a >> 16 & 0xFFFF),
        ("prmt.b32 %r3, %r1, %r2, 0x5410;", lambda a, b: a & 0xFFFF | b << 16),
        ("shfl.sync.bfly.b32 %r3, %r1, 4, 31, -1;", lambda a, b: a[np.arange(64) ^ 4]),
        ("shfl.sync.idx.b32 %r3, %r1, 3, 31, -1;", lambda a, b: a[np.arange(64) // 32 * 32 + 3]),
        ("redux.sync.max.s32 %r3, %r1, -1;", lambda a, b: np.repeat(a.reshape(2, 32).max(1), 32)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integers(instruction, expected):
    a, b = np.random.default_rng(0).integers(-(2**14), 2**14, (2, 64)).astype(np.int32)
    target = np.zeros(64, np.int32)
    run(ELEMENTWISE.replace("INSTRUCTION", instruction), a, b, target)
    assert (target == expected(a, b)).all()


@pytest.mark.parametrize(
    ("instruction", "expected", "error"),
    [
        ("fma.rn.f32 %r3, %r1, %r2, %r2;", lambda a, b: a * b + b, 0.0),
        ("ex2.approx.ftz.f32 %r3, %r1;", lambda a, b: np.exp2(a), 2.0**-22),
        ("lg2.approx.ftz.f32 %r3, %r2;", lambda a, b: np.log2(b), 2.0**-21),
        ("rcp.approx.ftz.f32 %r3, %r2;", lambda a, b: 1 / b, 2.0**-23),
        ("div.full.f32 %r3, %r1, %r2;", lambda a, b: a / b, 2.0**-22),
        ("min.xorsign.abs.f32 %r3, %r1, %r2;", lambda a, b: np.minimum(abs(a), abs(b)) * np.sign(a * b), 0.0),
        ("cvt.rn.bf16x2.f32 %r3, %r1, %r2; and.b32 %r3, %r3, -65536;", lambda a, b: a, 2.0**-8),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r3, %rs1;", lambda a, b: a, 2.0**-8),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_floats(instruction, expected, error):
    a, b = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    b, target = abs(b), np.zeros(64, np.float32)
    run(ELEMENTWISE.replace("INSTRUCTION", instruction), a, b, target)
    exact = expected(a.astype(float), b.astype(float))
    off = abs(target - exact) / np.maximum(abs(exact), 1.0 if "lg2" in instruction else 0.0)
    assert off.max() <= error + 2.0**-24
    assert error == 0.0 or off.max() > error / 8, "as far off as a GPU may be"


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_a_warp(transposed):
    """`a` of 16 x 16 times `b` of 16 x 8, both by `ldmatrix`."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    target, stored = np.zeros((16, 8), np.float32), np.ascontiguousarray(b if transposed else b.T)
    # Lane l brings in 16 bytes l of `a`, and lanes below 16 those of `b`.
    body = """
        shl.b32 %r1, %r0, 4; cvt.u64.u32 %rd3, %r1; add.s64 %rd4, %rd0, %rd3;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd4]; st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};
        setp.lt.u32 %p1, %r0, 16; add.s64 %rd5, %rd1, %rd3;
        @%p1 ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd5]; @%p1 st.shared.v4.b32 [%r1 + 512], {%r2, %r3, %r4, %r5};
        and.b32 %r6, %r0, 15; shl.b32 %r6, %r6, 5; and.b32 %r7, %r0, 16; add.s32 %r6, %r6, %r7;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r6];
        ROWS
        ldmatrix.sync.aligned.m8n8.x2.TRANSshared.b16 {%r14, %r15}, [%r8 + 512];
        mov.b32 %r20, 0f00000000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23},
            {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r20, %r21, %r22, %r23};
        shr.u32 %r24, %r0, 2; shl.b32 %r24, %r24, 5;
        and.b32 %r25, %r0, 3; shl.b32 %r25, %r25, 3; add.s32 %r24, %r24, %r25;
        cvt.u64.u32 %rd6, %r24; add.s64 %rd7, %rd2, %rd6;
        st.global.v2.b32 [%rd7], {%r20, %r21}; st.global.v2.b32 [%rd7 + 256], {%r22, %r23};
    """
    if transposed:  # 16 rows of 16 bytes
        rows = "and.b32 %r8, %r0, 15; shl.b32 %r8, %r8, 4;"
    else:  # 8 rows of 32 bytes; the second matrix is their second half
        rows = "and.b32 %r8, %r0, 7; shl.b32 %r8, %r8, 5; and.b32 %r9, %r0, 8; mad.lo.s32 %r8, %r9, 2, %r8;"
    body = body.replace("ROWS", rows).replace("TRANS", "trans." if transposed else "")
    run(body, a, stored, target, threads=32, shared=1024)
    np.testing.assert_allclose(target, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)


def test_products_of_sm_100():
    """`a` of 128 x 16 in tensor memory times `b` of 16 x 8 in shared memory: there once its barrier was waited for."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float16) for shape in ((128, 16), (8, 16)))
    block = Block(128, 0, [], 256, GlobalMemory())
    memory, thread = block.tensor_memory, np.arange(128, dtype=np.uint32)
    rows = thread // 32 * 32 << np.uint32(16)
    memory.store(rows, list(a.view(np.uint32).T), None)
    # Rows of 32 bytes, whose halves are swapped in every other four rows.
    halves = np.stack([half if row // 4 % 2 == 0 else half[::-1] for row, half in enumerate(b.reshape(8, 2, 8))])
    block.views[2][:128] = halves.reshape(-1).view(np.uint16)
    descriptor, instruction = np.full(128, 3 << 62, np.uint64), np.full(128, 1 << 4 | 1 << 17 | 8 << 24, np.uint32)
    result, barrier, first = np.full(128, 64, np.uint32), np.full(128, 128, np.uint32), thread == 0
    for keep in (False, True):
        memory.multiply(result, 0 * thread, descriptor, instruction, np.full(128, keep), first)
    memory.promise(barrier, first)
    assert np.isnan(np.stack(memory.load(rows + result, 8)).view(np.float32)).all()
    memory.wait(barrier, None)
    expected = 2 * a.astype(float) @ b.T.astype(float)
    np.testing.assert_allclose(
        np.stack(memory.load(rows + result, 8), 1).view(np.float32), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(MemoryError, match="rows of tensor memory that are another's"):
        memory.load(0 * rows, 1)
