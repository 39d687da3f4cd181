// How the agent stands with its CA: what the log says of it, once per change,
// and what /ready says.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/agent/internal/cache"
)

// repeatAfter is after how many rounds without a CA the log says so again.
const repeatAfter = 20

// standing is safe for concurrent use.
type standing struct {
	addresses []string
	log       *slog.Logger
	connects  prometheus.Counter
	connected *prometheus.GaugeVec // by address
	refusing  prometheus.Gauge

	mu sync.Mutex
	// guarded by mu
	address string            // that is followed; "" for none
	refused error             // why no replica is, if one refused; nil: it is away
	said    map[string]string // address → what the log said of it last
}

func newStanding(addresses []string, log *slog.Logger, reg prometheus.Registerer) *standing {
	s := &standing{
		addresses: addresses, log: log, said: map[string]string{},
		connects: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_agent_sync_connects_total", Help: "Sync streams opened to the CA.",
		}),
		connected: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "merlon_agent_ca_connected", Help: "1 for the address of the CA that is followed, 0 for the others.",
		}, []string{"address"}),
		refusing: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "merlon_agent_ca_refused", Help: "1 while the CA is not followed because it refuses this agent (evicted, banned, revoked), or knows less than this node has seen: its store was restored from an older backup.",
		}),
	}
	for _, address := range addresses {
		s.connected.WithLabelValues(address).Set(0)
	}
	reg.MustRegister(s.connects, s.connected, s.refusing)
	return s
}

// news says whether words are other than what was said of address last.
func (s *standing) news(address, words string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.said[address] == words {
		return false
	}
	s.said[address] = words
	return true
}

// joined notes that the replica at address is followed from now on.
func (s *standing) joined(ctx context.Context, address string, stale bool) {
	s.mu.Lock()
	for _, other := range s.addresses {
		s.connected.WithLabelValues(other).Set(0)
	}
	s.connected.WithLabelValues(address).Set(1)
	s.address, s.refused = address, nil
	s.mu.Unlock()
	s.refusing.Set(0)
	s.connects.Inc()
	if stale {
		return // spoke says so
	}
	s.mu.Lock()
	s.said = map[string]string{address: "connected"}
	s.mu.Unlock()
	s.log.LogAttrs(ctx, slog.LevelInfo, "connected to the CA", slog.String("address", address))
}

// spoke notes whether the replica at address reaches its store.
func (s *standing) spoke(ctx context.Context, address string, stale bool) {
	switch {
	case stale && s.news(address, "stale"):
		s.log.LogAttrs(ctx, slog.LevelWarn, "the CA cannot reach its store: it signs, and sends no changes",
			slog.String("address", address))
	case !stale && s.news(address, "connected"):
		s.log.LogAttrs(ctx, slog.LevelInfo, "the CA reaches its store again", slog.String("address", address))
	}
}

// parted notes that the session with the replica at address ended with err.
func (s *standing) parted(ctx context.Context, address string, err error, failures int, wait time.Duration) {
	s.mu.Lock()
	s.address = ""
	s.connected.WithLabelValues(address).Set(0)
	refusal := asRefusal(err)
	if refusal != nil {
		s.refused = fmt.Errorf("the CA at %s is not followed: %w", address, refusal)
		s.refusing.Set(1)
	}
	s.mu.Unlock()
	level, words := slog.LevelWarn, "away"
	if refusal != nil {
		level, words = slog.LevelError, "refused: "+refusal.Error()
	}
	if errors.Is(err, errEvidence) { // beside a refusal: what it asks for cannot be had
		words += ", no evidence"
	}
	if !s.news(address, words) && (failures == 0 || failures%repeatAfter != 0) {
		level = slog.LevelDebug // said already
	}
	s.log.LogAttrs(ctx, level, "no connection to the CA",
		slog.String("address", address), slog.Duration("retry_in", wait), slog.Any("err", err))
}

// fault says why no changes arrive, nil if they do.
func (s *standing) fault(state cache.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.refused != nil:
		return s.refused
	case !state.Synced || !state.Connected || s.address == "":
		return fmt.Errorf("no changes arrive from the CA at %s", strings.Join(s.addresses, ", "))
	case state.Stale:
		return fmt.Errorf("the CA at %s cannot reach its store: it signs, and sends no changes (all addresses: %s)",
			s.address, strings.Join(s.addresses, ", "))
	}
	return nil
}
