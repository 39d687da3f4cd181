// Mistakes in the command line: exit code 2, with what is wrong and what to type
// instead. A mistake is what cannot be right whatever runs: a flag or value that is
// none, one that is missing or would be ignored, a file that is named and not there;
// and what the CA says of the arguments that only it can judge.

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// usageError is a mistake in the command line.
type usageError struct{ message, hint string }

func (e usageError) Error() string { return e.message }

// checkArgs makes a wrong number of arguments a usage error everywhere.
func checkArgs(cmd *cobra.Command) {
	if inner := cmd.Args; inner != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			err := inner(c, args)
			if _, ok := errors.AsType[usageError](err); err == nil || ok {
				return err
			}
			message := err.Error()
			if strings.HasPrefix(message, "unknown command") { // cobra's words for NoArgs
				message = fmt.Sprintf("%s takes no argument, and %q is one", c.CommandPath(), args[0])
			}
			return usageError{message, "usage: " + c.UseLine()}
		}
	}
	cmd.SuggestionsMinimumDistance = 2
	for _, c := range cmd.Commands() {
		checkArgs(c)
	}
}

// checkFlags refuses flags that are given and empty, as by a variable that a script
// did not set, and those that would be ignored.
func (o *options) checkFlags(cmd *cobra.Command, root *pflag.FlagSet) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() == "string" && f.Value.String() == "" && err == nil {
			err = usageError{"--" + f.Name + " is empty", "give it a value or leave it out; is a variable unset? " + cmd.CommandPath() + " -h shows every flag"}
		}
	})
	given := func(name string) bool { // not one of the command's own by that name
		f := cmd.Flags().Lookup(name)
		return f == root.Lookup(name) && f.Changed
	}
	switch {
	case err != nil:
		return err
	// `trust show` has formats of its own and checks them itself.
	case cmd.Flags().Lookup("output") == root.Lookup("output") && o.output != "table" && o.output != "json":
		return usageError{fmt.Sprintf("unknown output format %q", o.output), "use -o table or -o json"}
	case given("token-file") && o.ca == "":
		return usageError{"--token-file is for a CA over the network", "add --ca HOST:PORT; on the admin socket your user is who you are"}
	case given("root-hash") && (o.ca == "" || o.tokenFile == ""):
		return usageError{"--root-hash is for who shows a token", "add --ca HOST:PORT and --token-file FILE; with an SVID the trust bundle says which CA is the right one"}
	case given("ca") && given("admin"):
		return usageError{"--ca and --admin are two ways to a CA", "give one of them"}
	}
	return o.checkAddress()
}

func (o *options) checkAddress() error {
	if o.ca == "" {
		return nil
	}
	if host, port, err := net.SplitHostPort(o.ca); err != nil || host == "" || port == "" {
		return usageError{fmt.Sprintf("--ca %q is not host:port", o.ca), "for example --ca ca.example.org:8443"}
	}
	return nil
}

// checkID refuses what is no SPIFFE ID, where it is only compared with others: it
// would find nothing.
func checkID(flag, id string) error {
	if id == "" {
		return nil
	}
	if _, err := spiffeid.FromString(id); err != nil {
		return usageError{fmt.Sprintf("--%s %q is not a SPIFFE ID: %v", flag, id, err), "for example --" + flag + " spiffe://shop.test/web"}
	}
	return nil
}

// notThere makes a usage error of err, if it is that what was named is not there.
func notThere(err error, hint string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return usageError{err.Error(), hint}
	}
	return err
}

// checkFolder refuses what is no folder.
func checkFolder(path, hint string) error {
	if info, err := os.Stat(path); err != nil || !info.IsDir() {
		return usageError{path + " is not a folder", hint}
	}
	return nil
}

// flagsOf are the flags that the fields of requests come from.
var flagsOf = map[string][]string{
	"parent_id": {"parent"}, "selectors": {"selector"}, "x509_svid_ttl_seconds": {"ttl"}, "jwt_svid_ttl_seconds": {"jwt-ttl"},
	"dns_names": {"dns"}, "common_name": {"cn"}, "expires_at": {"expires"}, "ttl_seconds": {"ttl"}, "agent_name": {"agent"},
	"destinations": {"destination"}, "per_mille": {"percent"}, "agent_id": {"agent"}, "authority_id": {"authority"}, "name": {"name", "bundle"},
}

// argumentHint says which flag of cmd it is that the CA refuses.
func argumentHint(cmd *cobra.Command, err error) string {
	help := cmd.CommandPath() + " -h shows every flag and an example; nothing was changed"
	field, _, ok := strings.Cut(status.Convert(err).Message(), ": ")
	if !ok || status.Code(err) != codes.InvalidArgument {
		return help
	}
	for _, flag := range append(flagsOf[field], strings.ReplaceAll(field, "_", "-")) {
		if f := cmd.Flags().Lookup(flag); f != nil && f.Changed {
			return "correct --" + flag + "; " + help
		}
	}
	return help
}
