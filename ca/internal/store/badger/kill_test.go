package badger_test

// Tests that need a second process: the test binary runs itself again. What a
// SIGKILL leaves is looked at in ../crashtest.

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"merlon.dev/ca/internal/store/badger"
)

const childDir = "MERLON_TEST_STORE_DIR"

// runChild is the whole life of a child process, which has the store open until
// it is killed. Elsewhere it returns.
func runChild() {
	dir := os.Getenv(childDir)
	if dir == "" {
		return
	}
	_, err := badger.Open(dir, badger.Options{})
	if err == nil {
		fmt.Println("open")
		select {}
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1) //nolint:forbidigo // the main of a child process
}

// child is a running child process.
type child struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

func startChild(t testing.TB, dir string) *child {
	t.Helper()
	return startChildWith(t, childDir+"="+dir)
}

// startChildWith starts the child that env, NAME=VALUE, asks for.
func startChildWith(t testing.TB, env string) *child {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd, bufio.NewScanner(out)}
	t.Cleanup(func() { c.kill(t) })
	if !c.lines.Scan() || c.lines.Text() != "open" {
		t.Fatalf("child said %q", c.lines.Text())
	}
	return c
}

// kill sends SIGKILL. A second call does nothing.
func (c *child) kill(t testing.TB) {
	t.Helper()
	if c.cmd.ProcessState != nil {
		return
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	for c.lines.Scan() { // to its end: Wait closes the pipe
	}
	if _, ok := errors.AsType[*exec.ExitError](c.cmd.Wait()); !ok {
		t.Error("child ended by itself")
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	c := startChild(t, dir)
	_, err := badger.Open(dir, badger.Options{})
	want := fmt.Sprintf("data_dir in use by another merlon-ca (pid %d)", c.cmd.Process.Pid)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("Open = %v; want %q", err, want)
	}
	c.kill(t)
	open(t, dir, badger.Options{}).Close()
}

func TestSecondStoreInOneProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	defer open(t, dir, badger.Options{}).Close()
	if _, err := badger.Open(dir, badger.Options{}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("Open = %v", err)
	}
}
