// What is done to the CA, and what that takes. CPU and memory are those of its
// process; time is that of a machine on which the whole fleet runs too.

package scale_test

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

// bench goes through the phases.
type bench struct {
	t *testing.T
	f *fleet
	sizes
	registered int // entries so far
}

// cost is what something took, n times.
type cost struct {
	N       int     `json:"n"`
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"ca_cpu_seconds"`
	RSSMiB  float64 `json:"ca_rss_mib"` // afterwards
}

// String says it of one.
func (c cost) String() string {
	return fmt.Sprintf("%.1f s, %.2f s of CPU (%.0f µs each), %.0f MiB", c.Seconds, c.CPU, c.each(), c.RSSMiB)
}

// each is the CPU of one in microseconds.
func (c cost) each() float64 { return c.CPU * 1e6 / float64(max(c.N, 1)) }

// spent is what has been since.
func spent(tb testing.TB, d *stage.Domain, begun time.Time, used time.Duration, n int) cost {
	tb.Helper()
	rss, _ := measure.MemoryOf(tb, d.CA.PID())
	return cost{N: n, Seconds: time.Since(begun).Seconds(), CPU: (measure.CPUOf(tb, d.CA.PID()) - used).Seconds(), RSSMiB: float64(rss) / (1 << 20)}
}

// take measures what do does n times.
func (b *bench) take(n int, do func()) cost {
	b.t.Helper()
	begun, used := time.Now(), measure.CPUOf(b.t, b.f.d.CA.PID())
	do()
	return spent(b.t, b.f.d, begun, used, n)
}

// entry is entry i, of an agent's node.
func (b *bench) entry(i int, a *agent) *capb.Entry {
	return &capb.Entry{
		SpiffeId: b.f.d.ID(fmt.Sprintf("/ns/team-%d/sa/service-%d", i%1000, i)), ParentId: b.f.d.ID("/agent/" + a.name),
		Selectors: []*capb.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 1000+i%5000)}, {Type: "unix", Value: fmt.Sprintf("path:/usr/bin/service-%d", i)}},
	}
}

// register adds entry i, and returns its ID.
func (b *bench) register(ctx context.Context, i int, a *agent) (string, error) {
	a.owed.Add(1)
	resp, err := b.f.admin(i).CreateEntry(ctx, &capb.CreateEntryRequest{Entry: b.entry(i, a)})
	return resp.GetEntry().GetEntryId(), err
}

// fill registers entries by the admin API until there are so many.
func (b *bench) fill(entries int, before cost) cost {
	b.t.Helper()
	from := b.registered
	c := b.take(max(0, entries-from), func() {
		b.f.each(max(0, entries-from), func(ctx context.Context, i int) error {
			_, err := b.register(ctx, from+i, b.f.agents[i%len(b.f.agents)])
			return err
		})
	})
	b.registered = max(from, entries)
	b.t.Logf("%d entries are registered: %v", entries, c)
	return cost{N: before.N + c.N, Seconds: before.Seconds + c.Seconds, CPU: before.CPU + c.CPU, RSSMiB: c.RSSMiB}
}

// coldStart starts the CA again, and takes the time until it serves.
func (b *bench) coldStart() cost {
	b.t.Helper()
	b.f.disconnect()
	b.f.d.CA.Stop()
	begun := time.Now()
	b.f.d.CA.Restart()
	b.untilReady()
	c := spent(b.t, b.f.d, begun, 0, 1)
	b.t.Logf("the CA serves %d entries after %v", b.registered, c)
	return c
}

// untilReady waits until the CA says that it serves.
func (b *bench) untilReady() {
	b.t.Helper()
	client := &http.Client{Timeout: time.Second}
	defer client.CloseIdleConnections()
	b.f.await("the CA is ready", func() (int, int) {
		resp, err := client.Get("http://" + b.f.d.Health + "/ready")
		if err != nil {
			return 0, 1
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return 0, 1
		}
		return 1, 1
	})
}

// cell is the CA with so many entries and agents.
type cell struct {
	Entries int  `json:"entries"`
	Agents  int  `json:"agents"`
	Start   cost `json:"cold_start"` // without agents
	// Listing is all agents that come with empty caches.
	Listing cost `json:"listing"`
	// At rest: share of one core, memory, and bytes a second to one agent and from it.
	IdlePercent float64 `json:"idle_percent_of_core"`
	IdleRSSMiB  float64 `json:"idle_rss_mib"`
	IdleDown    float64 `json:"idle_bytes_down_per_agent_second"`
	IdleUp      float64 `json:"idle_bytes_up_per_agent_second"`
	// Change is one entry more for one agent: from the call to its arrival there.
	Change    cost    `json:"change"`
	ChangeP50 float64 `json:"change_p50_ms"`
	ChangeP99 float64 `json:"change_p99_ms"`
	// Told counts messages with news to agents, the one concerned and all others.
	Told int `json:"agents_told_of_all_changes"`
}

// cell measures one, and ends its streams.
func (b *bench) cell(entries, agents int) cell {
	b.t.Helper()
	f, c := b.f, cell{Entries: entries, Agents: agents}
	f.forget(agents)
	c.Listing = b.take(agents, func() { f.connect(agents) })
	want := 0
	for _, a := range f.agents[:agents] {
		want += int(a.owed.Load())
	}
	if got := f.entries(agents); got != want {
		b.t.Errorf("%d agents hold %d entries; want %d", agents, got, want)
	}
	b.atRest(&c)
	b.changes(&c)
	f.disconnect()
	b.t.Logf("%d entries, %d agents: listing %v; at rest %.2f %% of a core, %.0f MiB; a change %.0f µs of CPU, %.1f ms at p50, %.1f at p99",
		entries, agents, c.Listing, c.IdlePercent, c.IdleRSSMiB, c.Change.each(), c.ChangeP50, c.ChangeP99)
	return c
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// atRest lets time go by.
func (b *bench) atRest(c *cell) {
	b.t.Helper()
	time.Sleep(b.Rest / 2) // what the beginning left is done
	down, up := b.f.received.Load(), b.f.sent.Load()
	rest := b.take(1, func() { time.Sleep(b.Rest) })
	c.IdlePercent, c.IdleRSSMiB = 100*rest.CPU/rest.Seconds, rest.RSSMiB
	each := float64(c.Agents) * rest.Seconds
	c.IdleDown, c.IdleUp = float64(b.f.received.Load()-down)/each, float64(b.f.sent.Load()-up)/each
}

// changes adds entries, one after the other, to agents that are connected. Of the CPU
// what the CA takes at rest is taken off.
func (b *bench) changes(c *cell) {
	b.t.Helper()
	var took []float64
	before := b.f.news.Load()
	c.Change = b.take(b.Changes, func() {
		for n := range b.Changes {
			a, begun := b.f.agents[n%c.Agents], time.Now() // which is connected
			id, err := b.register(b.t.Context(), b.registered, a)
			if err != nil {
				b.t.Fatal(err)
			}
			b.registered++
			var got *arrival
			b.f.await(fmt.Sprintf("change %d arrives", n), func() (int, int) {
				got = a.lastEntry.Load()
				return btoi(got != nil && got.entryID == id), 1
			})
			took = append(took, float64(got.at.Sub(begun).Microseconds())/1000)
		}
	})
	c.Change.CPU = max(0, c.Change.CPU-c.IdlePercent/100*c.Change.Seconds)
	c.ChangeP50, c.ChangeP99 = measure.Median(took), measure.Quantile(took, 0.99)
	c.Told = int(b.f.news.Load() - before)
	if c.Told != b.Changes {
		b.t.Errorf("%d changes, each for one agent, made %d messages with news; want one each", b.Changes, c.Told)
	}
}

// herd is all agents that come back at once.
type herd struct {
	cost
	// Ready is when the CA served again, after the cut.
	Ready    float64 `json:"ca_ready_seconds"`
	Attempts int     `json:"connection_attempts"`
	Down     float64 `json:"bytes_down_per_agent"`
	Up       float64 `json:"bytes_up_per_agent"`
	// Curve has how many were in sync after so many seconds.
	Curve [][2]float64 `json:"synced_after_seconds"`
}

// herd cuts all streams and waits until all agents are in sync again.
func (b *bench) herd(what string, cut func()) herd {
	b.t.Helper()
	f, n := b.f, len(b.f.agents)
	attempts, down, up := f.attempts.Load(), f.received.Load(), f.sent.Load()
	used, before := measure.CPUOf(b.t, f.d.CA.PID()), f.d.CA.PID()
	joined := make(map[*agent]int64, n)
	for _, a := range f.agents {
		joined[a] = a.joined.Load()
	}
	begun := time.Now()
	cut()
	if f.d.CA.PID() != before {
		used = 0
	}
	b.untilReady()
	h := herd{Ready: time.Since(begun).Seconds()}
	next := begun
	f.await("all agents are back", func() (int, int) {
		done := f.count(n, func(a *agent) bool { return a.joined.Load() > joined[a] })
		if now := time.Now(); now.After(next) || done == n {
			h.Curve = append(h.Curve, [2]float64{now.Sub(begun).Seconds(), float64(done)})
			next = now.Add(250 * time.Millisecond)
		}
		return done, n
	})
	h.cost = spent(b.t, f.d, begun, used, n)
	h.Attempts = int(f.attempts.Load() - attempts)
	h.Down, h.Up = float64(f.received.Load()-down)/float64(n), float64(f.sent.Load()-up)/float64(n)
	b.t.Logf("%s: %d agents are back after %v; the CA was ready after %.1f s; %d attempts", what, n, h.cost, h.Ready, h.Attempts)
	return h
}

// cut closes the connections of all agents.
func (f *fleet) cut() {
	for _, a := range f.agents {
		a.cut()
	}
}

// storm is many revocations at once.
type storm struct {
	cost
	Banned  int `json:"banned"`
	Revoked int `json:"revoked"`
	// Ended is when the last stream of a banned agent had ended, Heard when all other
	// agents had every revocation.
	Ended float64 `json:"streams_ended_seconds"`
	Heard float64 `json:"heard_by_all_seconds"`
	// Calls is when the administrator's calls were answered.
	Calls float64 `json:"calls_seconds"`
	Down  float64 `json:"bytes_down_per_agent"`
}

// storm bans agents and revokes SVIDs of others, all at once.
func (b *bench) storm() storm {
	b.t.Helper()
	f, s := b.f, storm{Banned: b.banned(), Revoked: b.revoked()}
	serials := b.issue(s.Revoked)
	banned, others := f.agents[:s.Banned], f.agents[s.Banned:]
	held := make([]int64, len(others))
	for i, a := range others {
		held[i] = a.revocations.Load()
	}
	down := f.received.Load()
	begun, used := time.Now(), measure.CPUOf(b.t, f.d.CA.PID())
	called := make(chan error, 1)
	go func() {
		called <- f.try(s.Banned+s.Revoked, func(ctx context.Context, i int) error {
			if i < s.Banned {
				_, err := f.admin(i).BanAgent(ctx, &capb.BanAgentRequest{Agent: banned[i].name, Note: "storm"})
				return err
			}
			_, err := f.admin(i).Revoke(ctx, &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: serials[i-s.Banned]}, Note: "storm"})
			return err
		})
	}()
	since := func() float64 { return time.Since(begun).Seconds() }
	f.await("the storm is over", func() (int, int) {
		select {
		case err := <-called:
			if err != nil {
				b.t.Fatal(err)
			}
			s.Calls = since()
		default:
		}
		if s.Ended == 0 && f.count(s.Banned, func(a *agent) bool { return a.banned.Load() }) == s.Banned {
			s.Ended = since()
		}
		if s.Heard == 0 && b.allHeard(others, held, s.Banned+s.Revoked) {
			s.Heard = since()
		}
		return btoi(s.Calls > 0) + btoi(s.Ended > 0) + btoi(s.Heard > 0), 3
	})
	s.cost, s.Down = spent(b.t, f.d, begun, used, s.Banned+s.Revoked), float64(f.received.Load()-down)/float64(len(others))
	if lost := f.count(len(f.agents), func(a *agent) bool { return a.banned.Load() }); lost != s.Banned {
		b.t.Errorf("%d agents are told that they are banned; want %d", lost, s.Banned)
	}
	b.t.Logf("%d agents banned and %d SVIDs revoked: all called after %.1f s, streams of the banned ended after %.1f s, heard by all after %.1f s; %v",
		s.Banned, s.Revoked, s.Calls, s.Ended, s.Heard, s.cost)
	return s
}

func (b *bench) allHeard(others []*agent, held []int64, n int) bool {
	for i, a := range others {
		if a.revocations.Load() < held[i]+int64(n) {
			return false
		}
	}
	return true
}

// issue has SVIDs issued to agents that stay, and returns their serial numbers.
func (b *bench) issue(n int) []string {
	b.t.Helper()
	serials, others := make([]string, n), b.f.agents[b.banned():]
	b.f.each(n, func(ctx context.Context, i int) (err error) {
		a := others[i%len(others)]
		cc, err := a.dial()
		if err != nil {
			return err
		}
		defer cc.Close()
		serials[i], err = a.sign(ctx, capb.NewNodeClient(cc))
		return err
	})
	return serials
}
