package faults_test

// Rows about the CA's disk: R2, R3, R17.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// losePower is R2. A SIGKILL leaves the kernel with all pages; what it cannot show is
// shown by a disk that forgets what was not synced (power_test.go), by syncs that
// fail, and by files as a disk may leave them.
func losePower(r *run) {
	disk := stage.NewLossyDisk(r)
	w := faults.New(r, faults.Setup{Disk: disk.Path})
	disk.Sync() // the CA's data were copied there
	w.Peers()
	w.Work(r.size(4, 32))
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	cutPower(r, w, disk, r.size(3, 200))
	failSyncs(r, w)
	w.Rest()
	damageStore(r, w, disk, r.size(4, 400))
	if r.full {
		r.number("store", goTest(r, "ca/internal/store/crashtest", "TestNothingIs|TestDamagedBadger", "MERLON_SWEEP=2000"))
	}
	r.verdict(w)
}

// failSyncs lets every sync of the CA fail from some time on: nothing that begins
// afterwards may be acknowledged, and what was before is there when it has been
// killed and started again.
func failSyncs(r *run, w *faults.World) {
	if _, err := exec.LookPath("strace"); err != nil {
		r.Fatal("strace is not installed: apt-get install strace")
	}
	trace := filepath.Join(r.TempDir(), "trace")
	strace := exec.Command("strace", "-f", "-p", fmt.Sprint(w.CA.PID()), "-e", "signal=none", "-e", "trace=fsync,fdatasync,msync",
		"-e", "inject=fsync,fdatasync,msync:error=EIO", "-o", trace)
	strace.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	mended := w.Rec.Break("every sync of the CA fails")
	if err := strace.Start(); err != nil {
		r.Fatal(err)
	}
	r.must("a sync fails", func() error {
		text, err := os.ReadFile(trace)
		if err == nil && !bytes.Contains(text, []byte("INJECTED")) {
			err = errors.New("none yet")
		}
		return err
	})
	failing := history.Now()
	time.Sleep(time.Second)
	w.CA.Kill()
	strace.Wait()
	mended()
	for _, op := range w.Rec.History().Ops {
		if (op.Kind == history.Create || op.Kind == history.Delete || op.Kind == history.Push || op.Kind == history.Sign) && op.Outcome == history.OK && op.Begin > failing {
			r.Errorf("acknowledged though no sync succeeds: %+v", op)
		}
	}
	w.RestartCA(r.bound(readyWithin))
	r.must("writes go on", func() error { return w.TryWrite(0) })
}

// damageStore damages copies of the store: a CA starts on one only if everything
// that was acknowledged is in it.
func damageStore(r *run, w *faults.World, disk *stage.LossyDisk, times int) {
	store, whole := filepath.Join(w.Data(), "store"), filepath.Join(r.TempDir(), "whole")
	w.CA.Stop()
	copyOf(r, whole, store)
	want := make(map[string]bool) // entry IDs
	for _, op := range w.Rec.History().Ops {
		switch {
		case op.Kind == history.Create && op.Outcome == history.OK:
			want[op.Value] = true
		case op.Kind == history.Delete:
			delete(want, op.Value)
		}
	}
	refused := 0
	for range times {
		copyOf(r, store, whole)
		disk.Sync() // or the disk keeps, for the next loss, all copies before
		what := damage(r, w, store)
		if !startsOn(r, w, what, want) {
			refused++
		}
	}
	copyOf(r, store, whole)
	w.RestartCA(r.bound(readyWithin))
	r.number("damaged stores", fmt.Sprintf("%d, of them refused %d, whole %d", times, refused, times-refused))
}

// startsOn says whether the CA starts on a damaged store; then all must be there.
func startsOn(r *run, w *faults.World, what string, want map[string]bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ca := exec.CommandContext(ctx, stage.Bin(r, "merlon-ca"), w.CA.Args...)
	var log stage.Buffer
	ca.Stderr = &log
	ca.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := ca.Start(); err != nil {
		r.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- ca.Wait() }()
	for {
		select {
		case err := <-ended:
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok || exit.ExitCode() != 1 || !strings.Contains(log.String(), "error:") {
				r.Errorf("%s: the CA ended by %v; want a refusal that explains itself\n%s", what, err, log.String())
			}
			return false
		case <-time.After(20 * time.Millisecond):
		}
		if w.Answers() == nil {
			break
		}
	}
	there := w.Entries()
	for id := range want {
		if there[id] == "" {
			r.Errorf("%s: the CA starts, and entry %s is lost", what, id)
			break
		}
	}
	ca.Process.Kill()
	<-ended
	return true
}

// damage cuts a file of the store, flips a bit of it or zeroes a part.
func damage(r *run, w *faults.World, store string) string {
	var files []string
	filepath.WalkDir(store, func(path string, d fs.DirEntry, err error) error {
		if info, e := d.Info(); err == nil && e == nil && info.Mode().IsRegular() && info.Size() > 0 && d.Name() != "LOCK" {
			files = append(files, path)
		}
		return err
	})
	path := files[w.Rng.IntN(len(files))]
	text, err := os.ReadFile(path)
	if err != nil {
		r.Fatal(err)
	}
	written := len(bytes.TrimRight(text, "\x00")) // Badger allocates its logs ahead
	at := w.Rng.IntN(max(written, 1))
	what := "cut"
	switch w.Rng.IntN(3) {
	case 0:
		text = text[:at]
	case 1:
		what = "bit flipped"
		text[at] ^= 1 << w.Rng.IntN(8)
	default:
		what = "zeroed"
		clear(text[at:min(at+512, len(text))])
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		r.Fatal(err)
	}
	return fmt.Sprintf("%s %s at %d of %d", filepath.Base(path), what, at, written)
}

func copyOf(r *run, to, from string) {
	r.Helper()
	if err := os.RemoveAll(to); err != nil {
		r.Fatal(err)
	}
	// As it is: the CA looks at modes.
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		r.Fatalf("%v: %s", err, out)
	}
}

// goTest runs tests of another package that are of the row, and says how many passed.
func goTest(r *run, pkg, names string, variables ...string) string {
	r.Helper()
	cmd := exec.Command("go", "test", "-count", "1", "-timeout", "2h", "-v", "-run", names, "merlon.dev/"+pkg)
	cmd.Env = append(os.Environ(), variables...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.Errorf("go test %s -run %s: %v\n%s", pkg, names, err, out)
	}
	return fmt.Sprintf("%s -run '%s': %d passed", pkg, names, bytes.Count(out, []byte("\n--- PASS")))
}

// fillDisk is R3.
func fillDisk(r *run) {
	disk := stage.SmallDisk(r, "size=160m,nr_inodes=2000")
	w := faults.New(r, faults.Setup{Disk: disk})
	w.Peers()
	w.Work(4)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	for _, f := range []struct {
		fault string
		begin func() (mend func())
	}{
		{"a full disk", func() func() { return stage.FillDisk(r, disk) }},
		{"no inodes", func() func() { return stage.TakeInodes(r, disk) }},
	} {
		mended := w.Rec.Break(f.fault)
		mend := f.begin()
		r.must(f.fault+": writes are refused, and why", func() error {
			err := w.TryWrite(0)
			if err == nil || !strings.Contains(err.Error(), "ResourceExhausted") || !strings.Contains(err.Error(), "read-only") {
				return fmt.Errorf("a write is answered %v", err)
			}
			return nil
		})
		w.Rest()
		if err := w.TrySign(); err != nil {
			r.Errorf("%s: an SVID that needs no write but its record: %v", f.fault, err)
		}
		w.Merlon("trust", "show")
		since := history.Now()
		r.must(f.fault+": peers call each other", func() error { return w.PeersCall(since) })
		mend()
		mended()
		w.Until("writes go on when there is space", r.bound(10*time.Second), func() error { return w.TryWrite(0) })
		w.Work(4)
	}
	lives(r, w.CA)
	limitFiles(r, w)
	readOnly(r, w, disk)
	r.verdict(w)
}

// limitFiles lets no file of the CA grow any more.
func limitFiles(r *run, w *faults.World) {
	mended := w.Rec.Break("a limit of file sizes")
	undo := stage.Limit(r, w.CA.PID(), unix.RLIMIT_FSIZE, 1)
	r.must("writes are refused for want of file size", func() error {
		if err := w.TryWrite(0); err == nil {
			return errors.New("a write succeeds")
		}
		return nil
	})
	time.Sleep(300 * time.Millisecond)
	undo()
	mended()
	// A failed append to the log ends all writes until a restart, by design.
	w.CA.Kill()
	w.RestartCA(r.bound(readyWithin))
	r.must("writes go on", func() error { return w.TryWrite(0) })
}

// readOnly starts the CA on a disk that takes no writes: it says so and ends.
func readOnly(r *run, w *faults.World, disk string) {
	mended := w.Rec.Break("a disk that is read-only")
	w.CA.Stop()
	remount := func(flags uintptr) {
		if err := syscall.Mount("", disk, "", syscall.MS_REMOUNT|flags, ""); err != nil {
			r.Fatalf("remount %s: %v", disk, err)
		}
	}
	remount(syscall.MS_RDONLY)
	_, stderr, err := stage.Run(r.Context(), r, nil, "merlon-ca", w.CA.Args...)
	if err == nil || !strings.Contains(stderr, "read-only") {
		r.Errorf("the CA on a read-only disk: %v; want it to say so\n%s", err, stderr)
	}
	remount(0)
	mended()
	w.RestartCA(r.bound(readyWithin))
}

// restore is R17. Nothing is lost in the end: what is put back is noticed each time,
// and then what was there is put in its place.
func restore(r *run) {
	w := faults.New(r, faults.Setup{})
	w.Peers()
	w.Work(2)
	time.Sleep(500 * time.Millisecond)
	w.Deny()
	w.Rest()
	store, keys := filepath.Join(w.Data(), "store"), filepath.Join(w.Data(), "keys")
	yesterday, today := filepath.Join(r.TempDir(), "yesterday"), filepath.Join(r.TempDir(), "today")
	w.CA.Stop()
	copyOf(r, yesterday, store)
	w.RestartCA(r.bound(readyWithin))
	for range r.size(20, 2000) {
		if err := w.TryWrite(0); err != nil {
			r.Fatal(err)
		}
	}
	w.Until("the agent has seen it", r.bound(20*time.Second), w.Connected)
	time.Sleep(time.Second) // it has heard of the last revision, and of the log
	w.CA.Stop()
	copyOf(r, today, store)

	mended := w.Rec.Break("an older store")
	copyOf(r, store, yesterday)
	w.CA.Restart()
	r.must("the CA notices, and says what to do", func() error {
		if log := w.CA.Log(); !strings.Contains(log, "put back to an earlier state") || !strings.Contains(log, "-accept-older-store=") {
			return errors.New("silent")
		}
		return nil
	})
	since := history.Now()
	r.must("peers call each other", func() error { return w.PeersCall(since) })
	w.CA.Stop()
	copyOf(r, store, today)
	mended()

	mended = w.Rec.Break("keys that are gone")
	if err := os.Rename(keys, keys+".away"); err != nil {
		r.Fatal(err)
	}
	if _, stderr, err := stage.Run(r.Context(), r, nil, "merlon-ca", w.CA.Args...); err == nil || !strings.Contains(stderr, "key") {
		r.Errorf("the CA without its keys: %v; want it to say so\n%s", err, stderr)
	}
	os.RemoveAll(keys)
	if err := os.Rename(keys+".away", keys); err != nil {
		r.Fatal(err)
	}
	mended()

	mended = w.Rec.Break("the store is lost, and restored")
	backup := filepath.Join(r.TempDir(), "last.backup")
	w.Merlon("store", "backup", backup, "--config", w.CA.Args[1])
	if err := os.Rename(store, store+".old"); err != nil {
		r.Fatal(err)
	}
	w.Merlon("store", "restore", backup, "--config", w.CA.Args[1], "--replaces", store+".old")
	mended()
	w.RestartCA(r.bound(readyWithin))
	w.Until("the agent follows again", r.bound(20*time.Second), w.Connected)
	w.Until("writes go on", r.bound(5*time.Second), func() error { return w.TryWrite(0) })
	r.verdict(w)
}
