// Command pebble runs pebble for tests: the ACME server that exists to test ACME
// clients, with a DNS server that answers 127.0.0.1 for every name, in a Go module of
// its own so that Merlon does not depend on a server. It ends when its standard input
// does, so that none outlives the test that started it.
//
//	pebble LISTEN CERT KEY DNS VALIDATION_PORT
//
// CERT and KEY are its own, in PEM. It validates at VALIDATION_PORT, where public ACME
// servers do at 443, and prints the root of what it issues.
package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/letsencrypt/challtestsrv"
	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
)

func main() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "pebble:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 5 {
		return errors.New("usage: pebble LISTEN CERT KEY DNS VALIDATION_PORT")
	}
	listen, cert, key, dns := args[0], args[1], args[2], args[3]
	port, err := strconv.Atoi(args[4])
	if err != nil {
		return err
	}
	// Without them it waits, and refuses some requests, at random.
	if err := errors.Join(os.Setenv("PEBBLE_VA_NOSLEEP", "1"), os.Setenv("PEBBLE_WFE_NONCEREJECT", "0")); err != nil {
		return err
	}
	logger := log.New(os.Stderr, "", 0)
	names, err := challtestsrv.New(challtestsrv.Config{Log: logger, DNSAddrs: []string{dns}})
	if err != nil {
		return err
	}
	names.SetDefaultDNSIPv4("127.0.0.1")
	names.SetDefaultDNSIPv6("")
	go names.Run()

	store := db.NewMemoryStore()
	issuer := ca.New(logger, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "the default"}})
	validator := va.New(logger, 0, port, false, dns, store)
	pages := wfe.New(logger, store, validator, issuer, []string{"pebble.test"}, false, false, 1, 1)
	err = pem.Encode(os.Stdout, &pem.Block{Type: "CERTIFICATE", Bytes: issuer.GetRootCert(0).DER})
	if err != nil {
		return err
	}
	srv := &http.Server{Addr: listen, Handler: pages.Handler(), ReadHeaderTimeout: 5 * time.Second}
	return srv.ListenAndServeTLS(cert, key)
}
