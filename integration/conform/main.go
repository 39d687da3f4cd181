// Command spiffe-conform puts the requirements of the SPIFFE standards to an
// implementation, whichever it is, from outside: its Workload API as a workload, its
// trust bundle endpoint as another trust domain, its validators with forged SVIDs.
//
//	spiffe-conform forge DIR                  make forged SVIDs, and a trust bundle for them
//	spiffe-conform run [flags]                check, and print each requirement
//	spiffe-conform corpus                     print the certification paths in x509-limbo's format
//
// It exits with 1 if a MUST is not kept, and with 2 for a command that makes no sense.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/integration/conform/pathcase"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

const usage = `spiffe-conform forge DIR     make forged SVIDs, and DIR/bundle.json for the implementation to trust as example.org
spiffe-conform run [flags]   check an implementation; spiffe-conform run -h lists the flags
spiffe-conform corpus        print the certification paths in x509-limbo's format
`

// usageError is a command that makes no sense.
type usageError struct{ what string }

func (e usageError) Error() string { return e.what }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := command(ctx, args, stdout, stderr)
	var wrong usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "spiffe-conform: %s\n%s", wrong.what, usage)
		return 2
	}
	fmt.Fprintln(stderr, "spiffe-conform: error:", printable(err.Error()))
	return 1
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "forge":
		return forgeTo(args[1], stderr)
	case len(args) == 1 && args[0] == "corpus":
		return pathcase.WriteLimbo(stdout, pathcase.All(failing{}))
	case len(args) >= 1 && args[0] == "run":
		return check(ctx, args[1:], stdout, stderr)
	case len(args) == 1 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help"):
		_, err := io.WriteString(stdout, usage)
		return err
	case len(args) == 0:
		return usageError{"say what to do"}
	}
	return usageError{fmt.Sprintf("%q: no such command", strings.Join(args, " "))}
}

func forgeTo(dir string, stderr io.Writer) error {
	now := time.Now()
	f, bundle, left, err := makeForgery(now)
	if err != nil {
		return err
	}
	if err := f.write(dir, bundle); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stderr, "%s: %d certification paths and %d tokens, good until %s; %d paths need a trust bundle or a moment of their own and are left out\nhave the implementation trust %s/%s as %s, and run with --forge %s\n",
		dir, len(f.Paths), len(f.Tokens), now.Add(forgedFor).Format("15:04"), len(left), dir, bundleFile, pathcase.TrustDomain, dir)
	return err
}

// options are the flags of run.
type options struct {
	socket, bundleURL, bundleCA, bundleID, forge, server, serve, output, junit string
}

func (o *options) flags(stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("spiffe-conform run", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.socket, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the Workload API, `unix:///path` (SPIFFE_ENDPOINT_SOCKET); this process needs an identity there")
	fs.StringVar(&o.bundleURL, "bundle-url", "", "the trust bundle endpoint, `https://…`")
	fs.StringVar(&o.bundleCA, "bundle-ca", "", "`FILE` with the CAs of a bundle endpoint of profile https_web, in PEM; without it the system's")
	fs.StringVar(&o.bundleID, "bundle-id", "", "`SPIFFE ID` of a bundle endpoint of profile https_spiffe; verified by the trust bundle of the Workload API")
	fs.StringVar(&o.forge, "forge", "", "`DIR` with forged SVIDs, whose bundle.json the implementation trusts as example.org; for ValidateJWTSVID and --server")
	fs.StringVar(&o.server, "server", "", "`host:port` of a server with mutual TLS and HTTP/1.1, whose validator gets forged X509-SVIDs")
	fs.StringVar(&o.serve, "serve", "", "`host:port` to serve forged X509-SVIDs at: a client that connects again and again, expecting spiffe://example.org/a, is the validator")
	fs.StringVar(&o.output, "o", "text", "`text or json`")
	fs.StringVar(&o.junit, "junit", "", "also write JUnit's format to `FILE`")
	return fs
}

// validate refuses what makes no sense.
func (o *options) validate(rest []string) error {
	switch {
	case len(rest) > 0:
		return usageError{fmt.Sprintf("%q: run takes flags only", rest[0])}
	case o.output != "text" && o.output != "json":
		return usageError{fmt.Sprintf("-o %s: text or json", o.output)}
	case o.socket == "" && o.bundleURL == "" && o.server == "" && o.serve == "":
		return usageError{"name something to check: --socket, --bundle-url, --server or --serve"}
	case (o.server != "" || o.serve != "") && o.forge == "":
		return usageError{"--server and --serve need --forge: spiffe-conform forge DIR makes what is presented"}
	case o.bundleID != "" && o.socket == "":
		return usageError{"--bundle-id needs --socket, whose trust bundle verifies it"}
	}
	return nil
}

func check(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	fs := o.flags(stderr)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err.Error()}
	}
	if err := o.validate(fs.Args()); err != nil {
		return err
	}
	r := newReport()
	if err := o.checkAll(ctx, r); err != nil {
		return err
	}
	results := r.list(o.missing)
	if o.junit != "" {
		if err := writeFile(o.junit, results); err != nil {
			return err
		}
	}
	write := writeText
	if o.output == "json" {
		write = writeJSON
	}
	if err := write(stdout, results); err != nil {
		return err
	}
	if n := mustFailures(results); n > 0 {
		return fmt.Errorf("%d requirements of level MUST are not kept", n)
	}
	return nil
}

func writeFile(path string, results []*result) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(writeJUnit(f, results), f.Close())
}

func (o *options) checkAll(ctx context.Context, r *report) error {
	var f *forgery
	if o.forge != "" {
		var err error
		if f, err = readForgery(o.forge, time.Now()); err != nil {
			return err
		}
	}
	server := bundleServer{url: o.bundleURL, caFile: o.bundleCA}
	if o.socket != "" {
		roots, err := o.checkSocket(ctx, r, f)
		if err != nil {
			return err
		}
		server.roots = roots
	}
	if o.bundleID != "" {
		id, err := spiffeid.FromString(o.bundleID)
		if err != nil {
			return usageError{fmt.Sprintf("--bundle-id: %v", err)}
		}
		server.id = id
	}
	if o.bundleURL != "" {
		if err := checkBundleURL(ctx, r, server); err != nil {
			return err
		}
		fetchedAgain(ctx, r, server)
	}
	if o.server != "" {
		if err := checkServer(ctx, r, o.server, f); err != nil {
			return err
		}
	}
	if o.serve != "" {
		return checkClient(ctx, r, o.serve, f)
	}
	return nil
}

// checkSocket checks the Workload API, and gives its own trust domain's roots.
func (o *options) checkSocket(ctx context.Context, r *report, f *forgery) (roots *x509bundle.Bundle, err error) {
	e, own, err := checkEndpoint(ctx, r, o.socket)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.cc.Close()) }()
	bundles, err := e.x509Bundles(ctx)
	if err != nil {
		return nil, err
	}
	if roots, err = x509bundle.ParseRaw(own.TrustDomain(), bundles.GetBundles()[own.TrustDomain().IDString()]); err != nil {
		return nil, err
	}
	if f != nil {
		return roots, e.checkValidate(ctx, r, own.TrustDomain(), f)
	}
	return roots, nil
}

// missing says which flag a requirement was not checked for.
func (o *options) missing(id string) string {
	switch kind := id[:1]; {
	case kind == "W":
		return "the WIT profile is not checked: it is Incubating"
	case kind == "K":
		return "the broker API is not checked: it is Incubating"
	case kind == "E" && o.socket == "":
		return "--socket was not given"
	case (kind == "B" || kind == "F") && o.bundleURL == "":
		return "--bundle-url was not given"
	case kind == "J" && o.forge == "":
		return "--socket and --forge were not given"
	case o.server == "" && o.serve == "":
		return "--server or --serve, and --forge, were not given"
	}
	return "no check applied"
}
