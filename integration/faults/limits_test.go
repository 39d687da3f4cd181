package faults_test

// Rows about processes that are denied something: files (R8), memory and processors
// (R9).

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

func env(name string) string { return os.Getenv(name) }

func signal(r *run, pid int, sig syscall.Signal) {
	r.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		r.Fatal(err)
	}
}

// takeFiles is R8: connections that nobody uses take every file that CA and agent
// may open.
func takeFiles(r *run) {
	w := faults.New(r, faults.Setup{})
	registerMe(r, w)
	w.Peers()
	w.Work(4)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	idle := r.size(200, 5000)
	for _, p := range []struct {
		name, network, address string
		pid                    int
		works                  func() error
	}{
		{"the CA", "tcp", w.GRPC, w.CA.PID(), func() error { _, _, err := w.Try("agent", "list"); return err }},
		{"the agent", "unix", strings.TrimPrefix(w.WorkloadAPI, "unix://"), w.Agent.PID(), func() error {
			_, err := fetch(w)
			return err
		}},
	} {
		mended := w.Rec.Break("no files are left to " + p.name)
		// As many as it has, and some more, which are gone soon.
		undo := stage.Limit(r, p.pid, unix.RLIMIT_NOFILE, uint64(openFiles(r, p.pid)+8))
		var conns []net.Conn
		for range idle {
			if c, err := net.DialTimeout(p.network, p.address, time.Second); err == nil {
				conns = append(conns, c)
			}
			if p.network == "unix" && len(conns) >= 200 {
				break // the kernel's queue of a Unix socket is short, and a connect waits
			}
		}
		before, began := measure.CPUOf(r, p.pid), time.Now()
		time.Sleep(2 * time.Second)
		spent := (measure.CPUOf(r, p.pid) - before).Seconds() / time.Since(began).Seconds()
		r.number("processor while "+p.name+" has no files", fmt.Sprintf("%.0f %%", 100*spent))
		if r.full && spent > 0.9 {
			r.Errorf("%s spins: it uses %.0f %% of a processor", p.name, 100*spent)
		}
		since := history.Now()
		r.must("peers call each other", func() error { return w.PeersCall(since) })
		for _, c := range conns {
			c.Close()
		}
		undo()
		mended()
		w.Until(p.name+" lets somebody in again", r.bound(10*time.Second), p.works)
	}
	r.number("idle connections", idle)
	r.verdict(w)
}

func openFiles(r *run, pid int) int {
	r.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		r.Fatal(err)
	}
	return len(files)
}

// starve is R9.
func starve(r *run) {
	w := faults.New(r, faults.Setup{})
	w.Peers()
	w.Work(r.size(8, 32))
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	pid := w.CA.PID()
	mended := w.Rec.Break("the CA has 128 MiB and a tenth of a processor")
	undo, err := stage.Confine(r, pid, 128<<20, 10)
	if err != nil {
		r.Fatalf("this machine cannot confine a process: %v", err)
	}
	began := history.Now()
	time.Sleep(time.Duration(r.size(3, 60)) * time.Second)
	answered, slowest := 0, time.Duration(0)
	for _, op := range w.Rec.History().Ops {
		if op.Begin > began && op.Kind == history.Create && op.Outcome == history.OK {
			answered++
			slowest = max(slowest, time.Duration(op.End-op.Begin))
		}
	}
	r.number("writes meanwhile", fmt.Sprintf("%d, the slowest in %v", answered, slowest.Round(time.Millisecond)))
	if answered == 0 {
		r.Error("no write succeeded")
	}
	if err := syscall.Kill(pid, 0); err != nil {
		r.Error(errors.New("the CA is gone"))
	}
	undo()
	mended()
	w.Until("writes go on", r.bound(2*time.Second), func() error { return w.TryWrite(0) })
	r.verdict(w)
}
