package faults_test

// Rows about networks and the cluster below a CA of several replicas: R6, R13.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// written waits until a replica takes a write.
func written(r *run, w *faults.World, ca int, when string) {
	r.Helper()
	w.Until("a write "+when, r.bound(15*time.Second), func() error { return w.TryWrite(ca) })
}

// refusesWrites waits until a replica that has lost its store says so.
func refusesWrites(r *run, w *faults.World, ca int) {
	r.Helper()
	r.must("a replica without its store refuses writes", func() error {
		err := w.TryWrite(ca)
		if err == nil || !strings.Contains(err.Error(), "store") && !strings.Contains(err.Error(), "DeadlineExceeded") {
			return fmt.Errorf("a write is answered %v", err)
		}
		return nil
	})
}

// calling waits until peers have called each other after now.
func calling(r *run, w *faults.World, when string) {
	r.Helper()
	since := history.Now()
	w.Until("calls "+when, r.bound(5*time.Second), func() error { return w.PeersCall(since) })
}

// partition is R6. The agent, the workloads and the harness are one machine, each
// replica and each member of etcd is another.
func partition(r *run) {
	n := stage.NewNetwork(r)
	c := n.StartCluster(3, 2)
	w := faults.OnReplicas(r, c, faults.Setup{})
	w.Peers()
	w.Work(4)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	agent := n.Self()
	first, second := c.Replicas[0].Space, c.Replicas[1].Space
	for range r.size(1, 10) {
		for _, way := range []struct {
			what     string
			from, to *stage.Namespace
		}{{"from the agent to a replica", agent, first}, {"from a replica to the agent", first, agent}, {"from the agent to the other", agent, second}} {
			mended := w.Rec.Break("packets are lost " + way.what)
			undo := n.Drop(way.from, way.to, 1)
			time.Sleep(time.Duration(r.size(1000, 15_000)) * time.Millisecond)
			calling(r, w, "while packets are lost "+way.what)
			written(r, w, 1, "while packets are lost "+way.what)
			undo()
			mended()
		}
		lossy(r, w, n, c)
		cutStore(r, w, n, c)
		mended := w.Rec.Break("replicas do not reach each other")
		n.Cut(first, second)
		written(r, w, 0, "while replicas do not reach each other")
		written(r, w, 1, "while replicas do not reach each other")
		n.Join(first, second)
		mended()
	}
	r.verdict(w)
}

// lossy lets 30 % of what everybody sends to the first replica, and it to them, be lost.
func lossy(r *run, w *faults.World, n *stage.Network, c *stage.Cluster) {
	mended := w.Rec.Break("30 % of the packets are lost")
	one := c.Replicas[0].Space
	var undo []func()
	for _, other := range []*stage.Namespace{n.Self(), c.Etcd.Members[0].Space, c.Etcd.Members[1].Space, c.Etcd.Members[2].Space} {
		undo = append(undo, n.Drop(one, other, 0.3), n.Drop(other, one, 0.3))
	}
	time.Sleep(time.Duration(r.size(2, 60)) * time.Second)
	calling(r, w, "while 30 % of the packets are lost")
	written(r, w, 1, "on the other replica while 30 % of the packets are lost")
	for _, f := range undo {
		f()
	}
	mended()
	written(r, w, 0, "after packets were lost")
}

// cutStore takes the store from the second replica, in one direction only.
func cutStore(r *run, w *faults.World, n *stage.Network, c *stage.Cluster) {
	mended := w.Rec.Break("a replica does not reach its store")
	var undo []func()
	for _, m := range c.Etcd.Members {
		undo = append(undo, n.Drop(c.Replicas[1].Space, m.Space, 1))
	}
	refusesWrites(r, w, 1)
	written(r, w, 0, "on the replica that reaches the store")
	calling(r, w, "while a replica does not reach its store")
	for _, f := range undo {
		f()
	}
	mended()
	w.Until("the replica is ready again", r.bound(15*time.Second), c.Replicas[1].Ready)
	written(r, w, 1, "on the replica that is back")
}

// breakEtcd is R13.
func breakEtcd(r *run) {
	c := stage.StartCluster(r, 3, 2)
	w := faults.OnReplicas(r, c, faults.Setup{})
	w.Peers()
	w.Work(4)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	both := func(when string) {
		r.Helper()
		written(r, w, 0, when)
		written(r, w, 1, when)
		calling(r, w, when)
	}
	for range r.size(1, 10) {
		mended := w.Rec.Break("SIGKILL of etcd's leader")
		leader := c.Etcd.Leader()
		leader.Kill()
		both("without the member that led")
		leader.Restart()
		mended()

		mended = w.Rec.Break("etcd's leader stands still")
		leader = c.Etcd.Leader()
		leader.Pause()
		time.Sleep(time.Duration(r.size(1, 30)) * time.Second)
		both("while the member that led stands still")
		leader.Resume()
		mended()

		mended = w.Rec.Break("etcd without a quorum")
		for _, m := range c.Etcd.Members[:2] {
			m.Kill()
		}
		refusesWrites(r, w, 0)
		calling(r, w, "without a quorum")
		for _, m := range c.Etcd.Members[:2] {
			m.Start()
		}
		mended()
		both("with a quorum again")
		tidyEtcd(r, w, c)
		both("after a shortage of space")
		mended = w.Rec.Break("SIGKILL of a replica")
		c.Replicas[1].Kill()
		c.Replicas[1].Restart()
		mended()
		w.Until("the replica is ready again", r.bound(5*time.Second), c.Replicas[1].Ready)
	}
	r.verdict(w)
}

// tidyEtcd compacts and defragments, and then lets etcd say that it has no space.
func tidyEtcd(r *run, w *faults.World, c *stage.Cluster) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client := c.Etcd.Client()
	status, err := client.Status(ctx, c.Etcd.Endpoints()[0])
	if err == nil {
		_, err = client.Compact(ctx, max(1, status.Header.GetRevision()-50))
	}
	if err != nil {
		r.Errorf("compact: %v", err)
	}
	for _, endpoint := range c.Etcd.Endpoints() {
		mended := w.Rec.Break("etcd is defragmented")
		if _, err := client.Defragment(ctx, endpoint); err != nil {
			r.Errorf("defragment: %v", err)
		}
		mended()
	}
	mended := w.Rec.Break("etcd has used up its space")
	alarm := &etcdserverpb.AlarmRequest{Action: etcdserverpb.AlarmRequest_ACTIVATE, Alarm: etcdserverpb.AlarmType_NOSPACE, MemberID: status.Header.GetMemberId()}
	if _, err := etcdserverpb.NewMaintenanceClient(client.ActiveConnection()).Alarm(ctx, alarm); err != nil {
		r.Fatalf("raise the alarm: %v", err)
	}
	r.must("writes are refused, and what to do", func() error {
		if err := w.TryWrite(0); err == nil || !strings.Contains(err.Error(), "alarm disarm") {
			return fmt.Errorf("a write is answered %v", err)
		}
		return nil
	})
	calling(r, w, "while etcd has no space")
	if _, err := client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: alarm.GetMemberID(), Alarm: alarm.GetAlarm()}); err != nil {
		r.Error(errors.Join(errors.New("disarm"), err))
	}
	mended()
}
