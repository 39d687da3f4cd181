package faults_test

// Rows about processes that are denied something: files (R8), memory and processors
// (R9).

import (
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

// little is the memory of a CA that R9 starves.
const little = 128 << 20

// starve is R9.
func starve(r *run) {
	w := faults.New(r, faults.Setup{})
	w.Peers()
	w.Work(r.size(8, 32))
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	mended := w.Rec.Break("the CA has 128 MiB and a tenth of a processor")
	group := confine(r, w, r.bound(readyWithin))
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
	lives(r, w.CA)
	countsAll(r, w.CA.PID(), group)
	group.Leave()
	mended()
	w.Until("writes go on", r.bound(2*time.Second), func() error { return w.TryWrite(0) })
	r.verdict(w)
}

// confine starts the CA again with little memory, and once it is ready leaves it a
// tenth of a processor.
func confine(r *run, w *faults.World, ready time.Duration) *stage.Group {
	r.Helper()
	group, err := w.CA.Confine(little)
	if err == nil {
		w.Until("the CA is ready in 128 MiB", ready, w.CAReady)
		err = group.Throttle(10)
	}
	if err != nil {
		r.Fatalf("this machine cannot confine a process: %v", err)
	}
	return group
}

// countsAll holds a group against its process: a limit is one only if all that the
// process has counts for it. Pages of its executable count for who read that first.
func countsAll(r *run, pid int, group *stage.Group) {
	r.Helper()
	const counted = 2 << 20 // the kernel counts in batches, and takes what nobody needs away
	r.must("the memory of the CA counts for its limit", func() error {
		own, resident := memoryOf(r, pid, "RssAnon"), memoryOf(r, pid, "VmRSS")
		now, peak := group.Memory()
		r.number("memory", fmt.Sprintf("%d MiB at most of %d; in the end %d, of them %d of the CA alone, which has %d with its executable",
			peak>>20, little>>20, now>>20, own>>20, resident>>20))
		if own == 0 || now < own-counted || peak > little {
			return fmt.Errorf("the CA has %d bytes; %d count, %d at most so far", own, now, peak)
		}
		return nil
	})
}

// memoryOf is a line of a process's status in /proc, in bytes.
func memoryOf(r *run, pid int, what string) (bytes int64) {
	r.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		r.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, what+":"); ok {
			if _, err := fmt.Sscanf(value, "%d kB", &bytes); err != nil {
				r.Fatalf("%s of process %d: %v", what, pid, err)
			}
		}
	}
	return bytes << 10
}

// lives ends a row whose process has ended by itself.
func lives(r *run, p *stage.Process) {
	r.Helper()
	if by, ended := p.Ended(); ended {
		r.Fatalf("%s has ended by itself, by signal %d (0: none):\n%s", p.Name, by, p.Log())
	}
}
