// The last call: a root that is about to end is followed by the one that is
// published, whoever has not acknowledged that (rotation.Policy.LastCall). Who
// was left behind is on record before it is done.

package ca

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/rotation"
)

// namesPerRecord bounds one line of the audit log.
const namesPerRecord = 100

// recordLeftBehind writes down everybody whom the activation of root id does not
// wait for.
func (a *authorities) recordLeftBehind(ctx context.Context, id string, left rotation.Wait, before *rotation.Authority, now time.Time) error {
	names := slices.Concat(left.Agents, left.Silent)
	if len(names) == 0 {
		return nil
	}
	var records []audit.Record
	for some := range slices.Chunk(names, namesPerRecord) {
		records = append(records, audit.Record{
			Time: now, Type: audit.Admin, Actor: "ca", AuthorityID: id, NotAfter: before.NotAfter,
			Detail: fmt.Sprintf("activate authority at the last call, because %s ends; left behind of %d: %s", before.ID, len(names), strings.Join(some, " ")),
		})
	}
	if err := a.audit.Append(ctx, records...); err != nil {
		return fmt.Errorf("record whom root %s leaves behind: %w", id, err)
	}
	return nil
}

// sayLeftBehind logs and counts it once it is done.
func (a *authorities) sayLeftBehind(ctx context.Context, id string, left rotation.Wait, before *rotation.Authority) {
	if len(left.Agents)+len(left.Silent) == 0 {
		return
	}
	a.lastCalls.Inc()
	a.log.LogAttrs(ctx, slog.LevelError, "root signs at the last call, before everybody has acknowledged it: those who have not need a new join token",
		slog.String("authority_id", id), slog.String("before", before.ID), slog.Time("before_ends", before.NotAfter), slog.String("left_behind", left.String()))
}

func newLastCalls(to prometheus.Registerer) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "merlon_ca_last_calls_total", Help: "Roots that began to sign before everybody had acknowledged them, because the one before was about to end.",
	})
	to.MustRegister(c)
	return c
}
