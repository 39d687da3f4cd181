// What the agent remembers of the CA's logs: of each replica's the last
// checkpoint that it verified, also across restarts. A later one must go on from
// it; one that does not proves that the log was forked or put back. The agent
// says so and keeps what it remembers, so that it says so again. It goes on
// following the CA: whom to trust is for humans to decide, who have the trust
// bundle and revocations for it, and an agent that stops would take the
// workloads down with the evidence.

package caclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/checkpoint"
)

const (
	logsFile = "logs" // storedLogs
	// maxLogs bounds how many are remembered; the one not seen for longest goes.
	maxLogs = 64
	// logMemory is after how long a log may have dropped what a proof would take:
	// it keeps records for at least as long as an SVID lives.
	logMemory = 24 * time.Hour
)

// storedLogs is the form of logsFile.
type storedLogs struct {
	TrustDomain string               `json:"trust_domain"`
	Logs        map[string]storedLog `json:"logs"` // by origin
}

// storedLog is a log as it was at a time.
type storedLog struct {
	Size int64     `json:"size"`
	Root tlog.Hash `json:"root"`
	At   time.Time `json:"at"`
}

// logs is safe for concurrent use.
type logs struct {
	dir         *datadir.Dir
	trustDomain string
	log         *slog.Logger
	forks       prometheus.Counter
	changed     chan struct{}

	mu sync.Mutex
	// guarded by mu
	seen map[string]storedLog
	said map[string]string // origin → what the log said of it last
}

// openLogs reads what an earlier run remembered. An unreadable file is an error,
// because what it forgets could be shown anew.
func openLogs(cfg Config) (*logs, error) {
	l := &logs{
		dir: cfg.DataDir, trustDomain: cfg.TrustDomain.Name(), log: cfg.Logger, seen: map[string]storedLog{}, said: map[string]string{},
		changed: make(chan struct{}, 1),
		forks: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_agent_log_forks_total", Help: "Checkpoints of the CA's audit logs that do not go on from the one before: a log was forked or put back.",
		}),
	}
	cfg.Registerer.MustRegister(l.forks)
	content, err := cfg.DataDir.Read(context.Background(), logsFile)
	if err != nil || content == nil {
		return l, err
	}
	stored, err := decodeLogs(content, l.trustDomain)
	if err != nil {
		return nil, err
	}
	maps.Copy(l.seen, stored.Logs)
	return l, nil
}

func decodeLogs(content []byte, trustDomain string) (stored storedLogs, err error) {
	if err := json.Unmarshal(content, &stored); err != nil {
		return storedLogs{}, fmt.Errorf("read %s: %w", logsFile, err)
	}
	if stored.TrustDomain != trustDomain {
		return storedLogs{}, fmt.Errorf("read %s: it is of trust domain %q, expected %q", logsFile, stored.TrustDomain, trustDomain)
	}
	for origin, s := range stored.Logs {
		if s.Size < 0 {
			return storedLogs{}, fmt.Errorf("read %s: log %.200q has %d entries", logsFile, origin, s.Size)
		}
	}
	return stored, nil
}

// states is for the CA.
func (l *logs) states() (states []*capb.LogState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for origin, s := range l.seen {
		states = append(states, &capb.LogState{Origin: origin, Size: s.Size, Root: s.Root[:]})
	}
	return states
}

// take verifies a checkpoint that the CA sent, and remembers it if it goes on
// from the one before.
func (l *logs) take(ctx context.Context, m *capb.LogCheckpoint, trust *cache.Trust, now time.Time) {
	if m == nil || trust == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	origin, err := l.verify(ctx, m, trust, now)
	if errors.Is(err, checkpoint.ErrFork) {
		l.forks.Inc()
	}
	words := ""
	if err != nil {
		words = err.Error()
	}
	if words != "" && words != l.said[origin] {
		l.log.LogAttrs(ctx, slog.LevelError, "checkpoint of the CA's audit log not accepted",
			slog.String("origin", origin), slog.Any("err", err),
			slog.String("hint", "keep data_dir of this node, and run merlon log verify on the CA's machine"))
	}
	l.said[origin] = words
}

// verify returns which log it is about. l.mu is held.
func (l *logs) verify(ctx context.Context, m *capb.LogCheckpoint, trust *cache.Trust, now time.Time) (origin string, err error) {
	key, err := checkpoint.VerifyChain(m.GetCertificates(), trust.Bundle.X509Authorities(), l.trustDomain, now)
	if err != nil {
		return "", err
	}
	origin = key.Origin()
	c, err := key.Open(m.GetCheckpoint())
	if err != nil {
		return origin, err
	}
	before, known := l.seen[origin]
	if known {
		growth, err := checkpoint.HashesFromBytes(m.GetGrowth())
		if err == nil {
			err = c.Follows(checkpoint.Checkpoint{Origin: origin, Size: before.Size, Root: before.Root}, growth)
		}
		forgotten := m.GetBeforeSize() == 0 && c.Size > before.Size && now.Sub(before.At) > logMemory
		if err != nil && !forgotten {
			return origin, err
		}
		if err != nil {
			l.log.LogAttrs(ctx, slog.LevelWarn, "the CA's audit log does not go back to what this node remembers of it",
				slog.String("origin", origin), slog.Time("since", before.At))
		}
	} else if other := l.ofReplica(origin); other != "" {
		l.log.LogAttrs(ctx, slog.LevelError, "a replica of the CA has begun another audit log",
			slog.String("origin", origin), slog.String("before", other))
	}
	l.remember(origin, storedLog{Size: c.Size, Root: c.Root, At: now})
	return origin, nil
}

// ofReplica is a log of the same replica as origin under another key, the last
// that was seen; "" if there is none. l.mu is held.
func (l *logs) ofReplica(origin string) (other string) {
	for o, s := range l.seen {
		if path.Dir(o) == path.Dir(origin) && (other == "" || s.At.After(l.seen[other].At)) {
			other = o
		}
	}
	return other
}

// remember has the memory written down, too. l.mu is held.
func (l *logs) remember(origin string, s storedLog) {
	l.seen[origin] = s
	for len(l.seen) > maxLogs {
		delete(l.seen, slices.MinFunc(slices.Collect(maps.Keys(l.seen)), func(a, b string) int { return l.seen[a].At.Compare(l.seen[b].At) }))
	}
	signal(l.changed)
}

// keep writes the memory down as it changes, until ctx ends and then once more.
// It has a goroutine of its own: a slow disk holds up nothing.
func (l *logs) keep(ctx context.Context) {
	failing := false
	for open := true; open; {
		select {
		case <-ctx.Done():
			open = false
		case <-l.changed:
		}
		err := l.save()
		if err != nil && !failing {
			l.log.LogAttrs(ctx, slog.LevelError, "checkpoints of the CA's audit logs not saved", slog.Any("err", err))
		}
		failing = err != nil
	}
}

func (l *logs) save() error {
	l.mu.Lock()
	content, err := json.Marshal(storedLogs{TrustDomain: l.trustDomain, Logs: l.seen})
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("encode what is remembered of the CA's logs: %w", err)
	}
	return l.dir.Write(logsFile, content)
}
