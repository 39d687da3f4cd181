// What the sidecar and the service manager say to each other: that it serves, reads its
// settings again, stops, or still lives.

package sidecar

import (
	"context"
	"fmt"
	"net/http"

	"merlon.dev/sdk/systemd"
)

// meetManager finds out whether a service manager has started this process, and says
// what is waited for.
func (s *Sidecar) meetManager() (err error) {
	if s.manager, err = systemd.Open(s.log); err != nil {
		return err
	}
	s.manager.Status("waiting for an identity")
	return nil
}

// announceReady is once calls are served.
func (s *Sidecar) announceReady() {
	s.announced.Store(true)
	s.manager.Ready("serving " + s.id.ID().String())
}

// announceReload says that a reload begins; done is for its end, whatever came of it.
// Before calls are served there is nothing to say.
func (s *Sidecar) announceReload() (done func()) {
	if !s.announced.Load() {
		return func() {}
	}
	s.manager.Reloading()
	return s.announceReady
}

// alive looks for the watchdog whether what runs can be looked at, and whether health
// answers where it is served. That agent or app are away is no reason to be killed.
func (s *Sidecar) alive(ctx context.Context) error {
	looked := make(chan struct{})
	go func() {
		s.listeners()
		close(looked)
	}()
	select {
	case <-looked:
	case <-ctx.Done():
		return fmt.Errorf("look at the listeners: %w", ctx.Err())
	}
	s.mu.Lock()
	lis := s.next[healthSocket]
	s.mu.Unlock()
	if lis == nil {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+lis.Addr().String()+"/live", http.NoBody)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("health does not answer: %w", err)
	}
	return res.Body.Close()
}
