// The app, where the sidecar is asked to start it: once its calls can be decided, and
// neither outlives the other.

package sidecar

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"merlon.dev/sdk/coredump"
)

// ExitError says how the command ended, where it did not end well.
type ExitError struct {
	Code int // as a shell tells it: 128 and the signal where it was killed by one
	err  error
}

// Error implements error.
func (e *ExitError) Error() string { return "the command ended: " + e.err.Error() }

// command is the app under way.
type command struct {
	process chan *os.Process // gets it when it has started; closed at the end
	done    chan struct{}
	err     error // when done is closed
}

// readyEvery is how often it is looked whether there is a policy by now.
const readyEvery = 50 * time.Millisecond

// startCommand starts the command once there is a policy, and ends s with it. It
// returns at once.
func (s *Sidecar) startCommand() *command {
	c := &command{process: make(chan *os.Process, 1), done: make(chan struct{})}
	if len(s.Command) == 0 {
		close(c.process)
		close(c.done)
		return c
	}
	go func() {
		defer s.stop()
		defer close(c.done) // before: who sees the stop is to see how the command ended
		// The kernel ends the command with the thread that started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		c.err = c.run(s)
	}()
	return c
}

func (c *command) run(s *Sidecar) error {
	defer close(c.process)
	if !s.awaitPolicy() {
		return nil
	}
	cmd := exec.Command(s.Command[0], s.Command[1:]...) //nolint:gosec // it is what the operator asks for
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the command: %w", err)
	}
	if err := coredump.Restore(cmd.Process.Pid); err != nil {
		s.log.LogAttrs(s.ctx, slog.LevelWarn, "the command leaves no core dumps", slog.Any("error", err))
	}
	s.log.LogAttrs(s.ctx, slog.LevelInfo, "command started", slog.String("command", s.Command[0]), slog.Int("pid", cmd.Process.Pid))
	c.process <- cmd.Process
	err := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return &ExitError{Code: exitCode(exit), err: err}
	}
	return err
}

func exitCode(e *exec.ExitError) int {
	if status, ok := e.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return e.ExitCode()
}

// awaitPolicy waits until calls can be decided. It is false where s ends before.
func (s *Sidecar) awaitPolicy() bool {
	for said := false; ; {
		err := s.id.PolicyReady()
		if err == nil {
			return true
		}
		if !said {
			said = true
			s.log.LogAttrs(s.ctx, slog.LevelInfo, "the command waits for a policy", slog.Any("err", err))
		}
		select {
		case <-s.ctx.Done():
			return false
		case <-time.After(readyEvery):
		}
	}
}

// end ends the command, if it still runs: by SIGTERM, and after limit by SIGKILL. That
// it ends by a signal then is as it should be.
func (c *command) end(limit time.Duration) error {
	select {
	case <-c.done:
		return c.err
	default:
	}
	process, ok := <-c.process
	if ok {
		_ = process.Signal(syscall.SIGTERM) // it may have ended just now
		late := time.AfterFunc(limit, func() { _ = process.Kill() })
		defer late.Stop()
	}
	<-c.done
	if _, ended := errors.AsType[*ExitError](c.err); ended {
		return nil
	}
	return c.err
}
