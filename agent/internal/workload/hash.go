// Digests of programs, made once per version of a file.

package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxProgramBytes is the size of the largest program that is hashed: about a
// second of work.
const MaxProgramBytes = 512 << 20

// maxHashes bounds the cache of digests.
const maxHashes = 1024

// hashes remembers digests by device, inode, size and times. Programs are hashed
// two at a time, and of one user one at a time: who starts many large programs is
// waited for by nobody but himself (SECURITY.md T39). It is safe for concurrent
// use.
type hashes struct {
	slots chan struct{}

	mu *sync.Mutex
	// guarded by mu
	known map[fileID]string
	turns map[uint32]*turn // of users who have something to hash
}

// turn is had by one of those who wait for it.
type turn struct {
	free    chan struct{}
	waiting int // and who has it; guarded by hashes.mu
}

func newHashes() hashes {
	return hashes{slots: make(chan struct{}, 2), mu: new(sync.Mutex), known: map[fileID]string{}, turns: map[uint32]*turn{}}
}

// of returns the digest of the program below dir, which must be exe, for uid.
func (h *hashes) of(ctx context.Context, uid uint32, dir int, exe fileID) (string, error) {
	if sum, ok := h.lookup(exe); ok {
		return sum, nil
	}
	if exe.size > MaxProgramBytes {
		return "", fmt.Errorf("the program has %d bytes, more than %d", exe.size, MaxProgramBytes)
	}
	done, err := h.begin(ctx, uid)
	if err != nil {
		return "", err
	}
	defer done()
	// Another caller may have hashed it while this one waited.
	if sum, ok := h.lookup(exe); ok {
		return sum, nil
	}
	sum, err := hashExe(ctx, dir, exe)
	if err != nil {
		return "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.known) >= maxHashes {
		clear(h.known) // rare; the programs in use come back at once
	}
	h.known[exe] = sum
	return sum, nil
}

// begin waits until uid may hash a program.
func (h *hashes) begin(ctx context.Context, uid uint32) (done func(), err error) {
	h.mu.Lock()
	t := h.turns[uid]
	if t == nil {
		t = &turn{free: make(chan struct{}, 1)}
		h.turns[uid] = t
	}
	t.waiting++
	h.mu.Unlock()
	leave := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if t.waiting--; t.waiting == 0 {
			delete(h.turns, uid)
		}
	}
	for i, slots := range []chan struct{}{t.free, h.slots} {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if i > 0 {
				<-t.free
			}
			leave()
			return nil, ctx.Err()
		}
	}
	return func() { <-h.slots; <-t.free; leave() }, nil
}

func (h *hashes) lookup(exe fileID) (string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sum, ok := h.known[exe]
	return sum, ok
}

// hashExe reads the program through /proc/PID/exe, which is the file that
// runs, whatever lies at its path.
func hashExe(ctx context.Context, dir int, exe fileID) (string, error) {
	fd, err := unix.Openat(dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open the program: %v", err)
	}
	f := os.NewFile(uintptr(fd), "exe")
	defer f.Close()
	if err := isFile(f, exe); err != nil {
		return "", err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, &contextReader{ctx: ctx, r: io.LimitReader(f, MaxProgramBytes+1)}); err != nil {
		return "", fmt.Errorf("read the program: %w", err)
	}
	// Written to meanwhile: the digest is of nothing that ever was.
	if err := isFile(f, exe); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func isFile(f *os.File, exe fileID) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat the program: %v", err)
	}
	if fileIDOf(&st) != exe {
		return errors.New("the program changed while it was read")
	}
	return nil
}

// contextReader stops reading when its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}
