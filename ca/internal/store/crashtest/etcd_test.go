package crashtest

// SIGKILL at random moments, on etcd: of the process that uses the store, and
// of its members, one at a time so that a quorum stays; and a leader that hangs.

import (
	"testing"
	"time"

	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

// cluster injects faults into the members below a rig.
type cluster struct {
	*rig
	etcd *stage.Etcd
	// pause is how long a leader hangs.
	pause time.Duration
}

func (c *cluster) sleep(least, most time.Duration) {
	time.Sleep(least + time.Duration(c.rng.Int64N(int64(most-least))))
}

// fault runs one life and kills it; in half of the cases a member is killed, or
// the leader hangs, while it lives, and the process is killed before or after
// the member is back.
func (c *cluster) fault() {
	c.t.Helper()
	p := c.launch(c.life())
	c.await(p, p.opened, "opening the store")
	c.sleep(20*time.Millisecond, 300*time.Millisecond)
	back := func() {}
	switch what := c.rng.IntN(10); {
	case what < 2: // any member
		m := c.etcd.Members[c.rng.IntN(len(c.etcd.Members))]
		m.Kill()
		back = m.Restart
		c.kills++
	case what < 4: // the one that leads
		m := c.etcd.Leader()
		m.Kill()
		back = m.Restart
		c.kills++
	case what < 5: // SIGSTOP: its connections stay, and nothing answers
		m := c.etcd.Leader()
		m.Pause()
		c.sleep(c.pause/2, c.pause)
		back = func() {
			m.Resume()
			c.etcd.Leader()
		}
	}
	c.sleep(0, 300*time.Millisecond)
	if c.rng.IntN(2) == 0 {
		back()
		c.sleep(0, 200*time.Millisecond)
		c.kill(p)
		return
	}
	c.kill(p)
	back()
}

// round is as rig.round, with faults of members among the kills.
func (c *cluster) roundOf(kills int) []string {
	c.t.Helper()
	for end := c.kills + kills; c.kills < end && len(c.history.trouble) == 0; {
		c.fault()
	}
	return c.round(0)
}

func TestKilledEtcdLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 3)
	where := target{Etcd: etcd.Config{
		Endpoints: e.Endpoints(), CAFile: e.Files.CA, CertFile: e.Files.Cert, KeyFile: e.Files.Key, RequestTimeout: 2 * time.Second,
	}}
	c := &cluster{rig: newRig(t, where, plain(t), seed(t)), etcd: e, pause: 2 * time.Second}
	total := number(t, "KILLS", killsPerHistory)
	if total > killsPerHistory {
		c.pause = 4 * time.Second // longer than an election
	}
	for c.kills < total && !t.Failed() {
		report(t, c.roundOf(min(total-c.kills, killsPerHistory)))
	}
}
