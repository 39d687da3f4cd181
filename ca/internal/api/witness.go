// Agents as witnesses of the log. Each remembers the last checkpoint that it
// verified, and says so at the start of Sync: a log that was put back, with the
// machine or by somebody, is noticed as a store is. And each gets the new ones
// with the proof that they go on from what it has, so that nobody can be shown
// another log than others without two checkpoints that prove it.

package api

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/sdk/checkpoint"
)

// announceInterval is how often agents get a new checkpoint. All get the same
// one, so that nearly all need the same proof.
const announceInterval = 30 * time.Second

// announcement is the checkpoint that agents get now. It is safe for concurrent
// use.
type announcement struct {
	mu sync.Mutex
	// guarded by mu
	at     time.Time
	signed audit.Signed
	chain  [][]byte           // without the root
	growth map[int64][][]byte // proofs from earlier sizes on
}

// witness is one agent's.
type witness struct {
	service *Service
	size    int64 // of what it has
}

// checkLog compares what the agent remembers of this log with the log, and
// refuses it where that shows more or something else. That is evidence, or a
// lie: no other agent suffers from it.
func (s *Service) checkLog(ctx context.Context, caller *Caller, seen []*capb.LogState) (*witness, error) {
	now, err := s.opts.Audit.Checkpoint()
	if errors.Is(err, audit.ErrNoKey) {
		return &witness{service: s}, nil
	}
	if err != nil {
		return nil, err
	}
	for _, state := range seen {
		if state.GetOrigin() != now.Origin || state.GetSize() <= 0 {
			continue
		}
		if state.GetSize() > now.Size {
			return nil, s.logPutBack(ctx, caller, now, state)
		}
		root, err := s.opts.Audit.Root(state.GetSize())
		if err != nil { // retention has dropped what it takes
			return &witness{service: s}, nil
		}
		if string(root[:]) != string(state.GetRoot()) {
			return nil, s.logPutBack(ctx, caller, now, state)
		}
		return &witness{service: s, size: state.GetSize()}, nil
	}
	return &witness{service: s}, nil
}

func (s *Service) logPutBack(ctx context.Context, caller *Caller, now audit.Signed, seen *capb.LogState) error {
	s.metrics.rollback.Inc()
	s.evidence.Do(func() {
		s.log.LogAttrs(ctx, slog.LevelError, "an agent has seen another audit log than this: it was put back to an earlier state, or changed",
			slog.String("spiffe_id", caller.Name), slog.String("origin", now.Origin),
			slog.Int64("size", now.Size), slog.Int64("seen_size", seen.GetSize()),
			slog.String("hint", "put the newest copy of the audit log back; or, if what is missing is lost, begin a new log: see The audit log in ca/README.md"))
	})
	cause := status.Errorf(codes.FailedPrecondition,
		"the audit log of this CA has %d records, and this agent has seen %d, or others: the log was put back to an earlier state, or changed. "+
			"On the CA's machine: put the newest copy of the audit log back; or, if what is missing is lost, move audit*.jsonl, audit.tree and keys/log-1 away, which begins a new log",
		now.Size, seen.GetSize())
	return s.refuse(ctx, caller, audit.Record{Detail: capb.Node_Sync_FullMethodName}, cause)
}

// next is the checkpoint that the agent does not have yet; nil: there is none.
func (w *witness) next(ctx context.Context) *capb.LogCheckpoint {
	c, size, err := w.service.announced.after(w.service.opts.Audit, w.size, time.Now())
	if err != nil {
		if !errors.Is(err, audit.ErrNoKey) {
			w.service.log.LogAttrs(ctx, slog.LevelError, "checkpoint not announced", slog.Any("err", err))
		}
		return nil
	}
	w.size = size
	return c
}

// after returns the announced checkpoint, if its log has more than size entries.
func (a *announcement) after(log *audit.Log, size int64, now time.Time) (*capb.LogCheckpoint, int64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.renew(log, now); err != nil {
		return nil, size, err
	}
	if a.signed.Size <= size {
		return nil, size, nil
	}
	growth, ok := a.growth[size]
	if !ok {
		proof, err := log.ProveGrowth(a.signed.Size, size)
		if err != nil {
			size, proof = 0, []tlog.Hash{} // the log does not go back so far
		}
		growth = checkpoint.HashesToBytes(proof)
		a.growth[size] = growth
	}
	return &capb.LogCheckpoint{
		Checkpoint: a.signed.Note, Certificates: a.chain, BeforeSize: size, Growth: growth,
	}, a.signed.Size, nil
}

// renew signs a new checkpoint when it is time. a.mu is held.
func (a *announcement) renew(log *audit.Log, now time.Time) error {
	if a.growth != nil && now.Sub(a.at) < announceInterval {
		return nil
	}
	signed, err := log.Checkpoint()
	if err != nil {
		return err
	}
	chain, err := log.Chain()
	if err != nil {
		return err
	}
	a.at, a.signed, a.chain, a.growth = now, signed, chain[:len(chain)-1], make(map[int64][][]byte)
	return nil
}
