// Signing for the tree: a checkpoint is made when somebody asks for one and the
// tree has grown, and put away with the tree every few seconds. That it lags
// takes nothing from what was promised: the lines are on disk.

package audit

import (
	"context"
	"crypto"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"merlon.dev/sdk/checkpoint"
	"merlon.dev/sdk/durable"
)

// saveInterval is how long a grown tree is not on disk, at most.
const saveInterval = 5 * time.Second

// Key signs for a log.
type Key struct {
	checkpoint.Key
	Signer crypto.Signer
	// Chain returns the certificates that vouch for the key now, DER, the key's
	// own first and the root last.
	Chain func() ([][]byte, error)
}

// Signed is a checkpoint as it is given out.
type Signed struct {
	checkpoint.Checkpoint
	Note []byte
}

// publisher signs and saves. It is part of Log.
type publisher struct {
	more   chan struct{} // there is something to save
	stop   context.CancelFunc
	saving sync.WaitGroup
	// closeErr is what the writer left behind; it is read after the writer.
	closeErr error

	signing sync.Mutex
	// guarded by signing
	key   *Key
	last  Signed
	chain [][]byte // what is on disk
}

func newPublisher() publisher {
	return publisher{more: make(chan struct{}, 1), stop: func() {}}
}

func (p *publisher) grown() {
	select {
	case p.more <- struct{}{}:
	default:
	}
}

// ErrNoKey is returned where a checkpoint is asked for before Publish.
var ErrNoKey = errors.New("the audit log has no key yet to sign checkpoints with")

// Publish lets the log sign checkpoints from now on. It refuses a key that has
// not signed the checkpoint which is on disk. Call it once.
func (l *Log) Publish(key Key) error {
	signed, err := os.ReadFile(filepath.Join(treeDir(l.path), checkpointFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errNotDir) {
		return fmt.Errorf("read the checkpoint of the audit log: %w", err)
	}
	if err == nil {
		if _, err := key.Open(signed); err != nil {
			return fmt.Errorf("the audit log in %s is another one than that of this CA's log key: %w", filepath.Dir(l.path), err)
		}
	}
	l.signing.Lock()
	l.key = &key
	l.signing.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	l.saving.Go(func() { l.keepSaved(ctx) })
	return nil
}

func (l *Log) stopPublishing() {
	l.stop()
	l.saving.Wait()
}

// Checkpoint signs for the log as it is now.
func (l *Log) Checkpoint() (Signed, error) {
	l.signing.Lock()
	defer l.signing.Unlock()
	if l.key == nil {
		return Signed{}, ErrNoKey
	}
	size := l.tree.Size()
	if l.last.Note != nil && l.last.Size == size {
		return l.last, nil
	}
	return l.sign(size)
}

// sign makes the checkpoint of size. l.signing is held.
func (l *Log) sign(size int64) (Signed, error) {
	root, err := l.tree.Root(size)
	if err != nil {
		return Signed{}, fmt.Errorf("sign a checkpoint: %w", err)
	}
	text, err := l.key.Sign(size, root, l.key.Signer)
	if err != nil {
		return Signed{}, err
	}
	signed := Signed{checkpoint.Checkpoint{Origin: l.key.Origin(), Size: size, Root: root}, text}
	if size > l.last.Size || l.last.Note == nil {
		l.last = signed
	}
	return signed, nil
}

// Chain returns the certificates that vouch for the log's key now.
func (l *Log) Chain() ([][]byte, error) {
	l.signing.Lock()
	defer l.signing.Unlock()
	if l.key == nil {
		return nil, ErrNoKey
	}
	return l.key.Chain()
}

// keepSaved saves the tree as it grows, and drops what is old, until ctx ends.
func (l *Log) keepSaved(ctx context.Context) {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.more:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(saveInterval):
		}
		err := l.save()
		if err == nil {
			err = l.retain(ctx, time.Now())
		}
		if err != nil && !failing && ctx.Err() == nil {
			l.log.LogAttrs(ctx, slog.LevelError, "tree of the audit log not saved", slog.Any("err", err))
		}
		if failing = err != nil; failing {
			l.grown() // comes again
		}
	}
}

// save puts the tree away with a checkpoint. While the disk is low or full it
// does not: the lines are enough.
func (l *Log) save() error {
	l.signing.Lock()
	keyed := l.key != nil
	l.signing.Unlock()
	if !keyed || l.low.Load() || l.tree.Unsaved() == 0 {
		return nil
	}
	if err := l.tree.Save(l.state); !isFull(err) {
		return err
	}
	return nil
}

// savedSize is how many records the checkpoint on disk counts.
func (l *Log) savedSize() int64 { return l.tree.Size() - l.tree.Unsaved() }

// Vouch saves the tree with a checkpoint, and appends a record that there is
// one: from then on a log without it is one that was robbed of it. What a crash,
// or anybody else, left beyond the checkpoint that was there is named in a
// record before it is signed for. Call it once, after Publish.
func (l *Log) Vouch(ctx context.Context) error {
	if n := l.tree.Unsaved(); l.beyond > 0 {
		l.log.LogAttrs(ctx, slog.LevelWarn, "audit log goes on beyond its last checkpoint, as after a crash: the records are taken over",
			slog.Int64("checkpoint_size", l.tree.Size()-n), slog.Int64("records", l.beyond))
		detail := fmt.Sprintf("take over %d audit records beyond the last checkpoint", l.beyond)
		if err := l.Append(ctx, Record{Type: Admin, Actor: "ca", Detail: detail}); err != nil {
			return err
		}
	}
	if err := l.save(); err != nil {
		return err
	}
	size := l.savedSize()
	if size == 0 {
		return nil // the disk is low: the next start has it
	}
	return l.Append(ctx, Record{Type: Admin, Actor: "ca", Detail: "save a checkpoint of the audit log", CheckpointSize: uint64(size)})
}

// state replaces the checkpoint on disk.
func (l *Log) state(size int64) error {
	l.signing.Lock()
	defer l.signing.Unlock()
	signed, err := l.sign(size)
	if err != nil {
		return err
	}
	chain, err := l.key.Chain()
	if err != nil {
		return err
	}
	dir := treeDir(l.path)
	if !sameChain(chain, l.chain) {
		var text []byte
		for _, der := range chain {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		if err := durable.WriteFile(dir, chainFile, text); err != nil {
			return err
		}
		l.chain = chain
	}
	return durable.WriteFile(dir, checkpointFile, signed.Note)
}
