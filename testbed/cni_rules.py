"""Every sentence of the CNI specification that obliges with "must", and the tests that hold us to it.

Sections are those of 1.1.0's SPEC.md; what only 0.3.1 and 0.4.0 say is in `cni_rules_of_0.py`. Sentences are shortened.
`test_cni_spec.py` sees that each test exists; the row `spec` of `make accept ONLY=reliability` runs them all.
"""

from __future__ import annotations

from testbed.cni_rule import (
    AGENT,
    BAD,
    BOTH_RUNTIMES,
    CHAIN,
    CONTAINERD,
    EXECUTABLE,
    PODMAN,
    QUEUE,
    SPEC,
    UNIT_API,
    UNIT_REQUEST,
    UNIT_RESULT,
    Rule,
    delegated,
    plugin,
    runtime,
)
from testbed.cni_rules_of_0 import OF_0

_FORMAT = "1 Configuration format"
_OBJECTS = "1 Plugin configuration objects"
_VERSIONS = "1 Version considerations"
_OVERVIEW = "2 Overview"
_PARAMETERS = "2 Parameters"
_ERRORS = "2 Errors"
_ADD, _DEL, _CHECK, _STATUS, _GC = (f"2 {name}" for name in ("ADD", "DEL", "CHECK", "STATUS", "GC"))
_LIFECYCLE = "3 Lifecycle & Ordering"
_ATTACHMENT = "3 Attachment Parameters"
_ADDING, _CHECKING = "3 Adding an attachment", "3 Checking an attachment"
_DERIVING = "3 Deriving execution configuration"
_DELEGATION = "4 Plugin Delegation"
_SUCCESS, _ERROR, _VERSION = "5 Success", "5 Error", "5 Version"

_OF_1: tuple[Rule, ...] = (
    plugin(
        _FORMAT,
        "name: must start with an alphanumeric character, followed by alphanumerics, _, . or -",
        f"{SPEC}test_network_names",
        f"{UNIT_REQUEST}test_a_bad_value_is_an_invalid_configuration",
    ),
    runtime(
        _FORMAT,
        "If disableCheck is true, runtimes must not call CHECK",
        f"{SPEC}test_the_least_configuration_is_enough",
    ),
    runtime(
        _FORMAT,
        "If disableGC is true, runtimes must not call GC",
        f"{SPEC}test_the_least_configuration_is_enough",
    ),
    runtime(
        _OBJECTS,
        "The runtime must pass plugin configuration through, unchanged",
        f"{EXECUTABLE}test_add_hands_over_everything_and_prints_the_result",
    ),
    runtime(
        _OBJECTS,
        "type: must not contain characters disallowed in file paths",
        f"{SPEC}test_type_is_no_path_to_us",
    ),
    delegated(_OBJECTS, "ipam.type: must not contain characters disallowed in file paths"),
    runtime(
        _OBJECTS,
        "Runtimes must preserve unknown fields in plugin configuration objects",
        f"{UNIT_REQUEST}test_an_unknown_key_is_refused_with_key_value_and_the_nearest_known_one",
        f"{UNIT_REQUEST}test_namespaced_keys_are_not_ours_to_refuse",
    ),
    runtime(
        _VERSIONS,
        "Runtimes must select the highest supported version of those that the configuration gives",
        f"{EXECUTABLE}test_version_needs_neither_agent_nor_input",
        f"{AGENT}test_add_in_every_version",
    ),
    plugin(
        _VERSIONS,
        "The configuration format must remain compatible within major versions",
        f"{SPEC}test_an_attachment_outlives_a_change_of_version",
    ),
    runtime(
        _OVERVIEW,
        "The runtime must execute the plugin in the runtime's networking domain",
        f"{SPEC}test_the_agents_answer_does_not_depend_on_the_callers_namespace",
    ),
    plugin(
        _PARAMETERS,
        "CNI_CONTAINERID: must not be empty",
        f"{EXECUTABLE}test_every_missing_variable_is_named",
        f"{UNIT_REQUEST}test_bad_variables_are_named",
    ),
    plugin(
        _PARAMETERS,
        "CNI_CONTAINERID: must start with an alphanumeric character, followed by alphanumerics, _, . or -",
        f"{EXECUTABLE}test_invalid_variables_are_named",
        f"{BAD}test_variables",
    ),
    plugin(
        _PARAMETERS,
        "CNI_IFNAME: if the plugin is unable to use this interface name it must return an error",
        f"{EXECUTABLE}test_invalid_variables_are_named",
        f"{SPEC}test_interface_names",
    ),
    plugin(
        _ERRORS,
        "A plugin must exit with a return code of 0 on success, and non-zero on failure",
        f"{SPEC}test_the_exit_status_says_how_it_went",
        f"{EXECUTABLE}test_the_other_commands_print_nothing_on_success",
        f"{EXECUTABLE}test_an_error_of_the_agent_is_printed_as_it_is",
    ),
    plugin(
        _ADD,
        "If successful, the plugin must output a result on standard out",
        f"{AGENT}test_add_in_every_version",
        f"{EXECUTABLE}test_an_add_without_a_result_is_malformed",
    ),
    plugin(
        _ADD,
        "A plugin that was given a prevResult must handle it, by passing it through or modifying it",
        f"{AGENT}test_a_chain_keeps_the_earlier_result",
        f"{SPEC}test_another_plugin_in_front_of_ours",
    ),
    plugin(
        _ADD,
        "If an interface of the requested name already exists in the container, the plugin must return an error",
        f"{BAD}test_an_interface_that_exists",
        f"{BAD}test_an_attachment_that_exists",
    ),
    plugin(
        _DEL,
        "Plugins must accept multiple DELs for one attachment, and return success if what they made is missing",
        f"{AGENT}test_del_twice",
        f"{AGENT}test_del_of_what_was_never_added",
        f"{AGENT}test_del_with_the_namespace_gone",
        f"{AGENT}test_del_with_empty_netns",
        f"{QUEUE}test_a_repeated_del_replaces_its_entry",
    ),
    plugin(
        _CHECK,
        "The plugin must consult prevResult to determine the expected interfaces and addresses",
        f"{SPEC}test_check_goes_by_the_result",
        f"{UNIT_REQUEST}test_check_needs_the_result_of_add",
    ),
    plugin(
        _CHECK,
        "The plugin must allow for a later chained plugin to have modified networking resources, e.g. routes",
        f"{AGENT}test_check_tolerates_what_later_plugins_changed",
        f"{CHAIN}test_several_interfaces_with_routes_by_source",
        f"{SPEC}test_check_goes_by_the_result",
    ),
    plugin(
        _CHECK,
        "The plugin must handle CHECK being called immediately after ADD",
        f"{SPEC}test_check_right_after_add",
    ),
    runtime(
        _CHECK,
        "A runtime must not call CHECK for a container that has not been ADDed, or has been DELeted",
        f"{AGENT}test_check_of_what_was_never_added",
    ),
    runtime(
        _CHECK, "A runtime must not call CHECK if disableCheck is true", f"{SPEC}test_the_least_configuration_is_enough"
    ),
    runtime(
        _CHECK,
        "A runtime must include the prevResult of the preceding ADD",
        f"{UNIT_REQUEST}test_check_needs_the_result_of_add",
    ),
    runtime(
        _CHECK,
        "All parameters, with the exception of CNI_PATH, must be the same as of ADD",
        f"{SPEC}test_check_goes_by_the_result",
    ),
    plugin(
        _STATUS,
        "A plugin must exit with zero if it is ready to service ADD requests",
        f"{AGENT}test_status_and_version",
        f"{SPEC}test_status_says_whether_add_would_work",
    ),
    plugin(
        _STATUS,
        "If it is not able to service ADD requests, it must exit with a non-zero return code and output an error",
        f"{SPEC}test_status_says_whether_add_would_work",
        f"{EXECUTABLE}test_an_agent_that_is_away",
        f"{EXECUTABLE}test_a_malformed_answer_is_an_error_of_the_specification",
    ),
    plugin(
        _STATUS,
        "STATUS is purely informational: a plugin must not rely on STATUS being called",
        f"{SPEC}test_status_is_not_needed",
    ),
    delegated(_STATUS, "A plugin that relies on a delegated plugin must also execute its STATUS"),
    runtime(
        _GC,
        "A runtime must not use GC as a substitute for DEL",
        f"{AGENT}test_gc_removes_the_invalid_and_keeps_the_rest",
    ),
    delegated(_GC, "Plugins must forward all GC calls to delegated plugins"),
    runtime(
        _LIFECYCLE,
        "The runtime must create a new network namespace before invoking any plugins",
        f"{BAD}test_a_namespace_that_is_gone",
        f"{BAD}test_a_path_that_is_no_namespace",
        f"{BAD}test_the_hosts_own_namespace",
    ),
    runtime(
        _LIFECYCLE,
        "The runtime must not invoke parallel operations for the same container",
        f"{BAD}test_adds_of_one_id_at_once",
    ),
    plugin(
        _LIFECYCLE,
        "Plugins must handle being executed concurrently across different containers",
        f"{AGENT}test_many_at_once",
        f"{BAD}test_more_adds_at_once_than_there_is_room_for",
        f"{CONTAINERD}test_many_pods_at_once",
    ),
    plugin(
        _LIFECYCLE,
        "If necessary, they must implement locking on shared resources",
        f"{AGENT}test_many_at_once",
        f"{QUEUE}test_many_dels_at_once_are_all_queued",
    ),
    runtime(
        _LIFECYCLE,
        "The runtime must ensure that no add or delete is in progress before executing gc",
        f"{UNIT_API}test_gc_waits_for_calls_and_calls_wait_for_gc",
        f"{SPEC}test_gc_during_adds_and_dels",
    ),
    runtime(
        _LIFECYCLE,
        "The runtime must wait for gc to complete before it issues new adds or deletes",
        f"{UNIT_API}test_gc_waits_for_calls_and_calls_wait_for_gc",
        f"{UNIT_API}test_a_gc_that_is_given_up_lets_calls_in_again",
        f"{SPEC}test_gc_during_adds_and_dels",
    ),
    runtime(
        _LIFECYCLE,
        "The runtime must ensure that add is eventually followed by delete",
        f"{AGENT}test_gc_removes_the_invalid_and_keeps_the_rest",
        "tests/kernel/test_reboot.py::test_addresses_are_not_leaked",
    ),
    runtime(
        _LIFECYCLE,
        "A delete must still be executed even if the add fails",
        f"{CHAIN}test_a_later_plugin_that_refuses_leaves_nothing",
        f"{PODMAN}test_a_refusal_is_podmans_error",
        f"{CONTAINERD}test_a_refusal_is_containerds_error",
    ),
    runtime(
        _ATTACHMENT,
        "Container ID: must not be empty, must start with an alphanumeric character",
        f"{UNIT_REQUEST}test_bad_variables_are_named",
    ),
    runtime(
        _ATTACHMENT,
        "The runtime must be provided a list of paths to search for plugins, which must be provided in CNI_PATH",
        f"{EXECUTABLE}test_add_hands_over_everything_and_prints_the_result",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _ADDING,
        "The runtime must store the result of the final plugin, as it is required for check and delete",
        f"{CHAIN}test_every_version_through_a_chain",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _CHECKING,
        "The runtime must use the same attachment parameters as for the add",
        f"{SPEC}test_check_goes_by_the_result",
    ),
    runtime(
        _DERIVING,
        "The configuration must be transformed to a format understood by the plugin",
        f"{CHAIN}test_every_version_through_a_chain",
    ),
    runtime(
        _DERIVING,
        "cniVersion, name, runtimeConfig and prevResult must be inserted by the runtime",
        f"{UNIT_REQUEST}test_runtime_config_wins_and_its_keys_are_read_in_any_case",
        *BOTH_RUNTIMES,
    ),
    runtime(
        _DERIVING,
        "For GC cni.dev/valid-attachments must be inserted by the runtime",
        f"{UNIT_REQUEST}test_gc_reads_what_to_keep_under_both_names",
        f"{SPEC}test_the_exit_status_says_how_it_went",
    ),
    runtime(
        _DERIVING,
        "capabilities must be removed by the runtime",
        f"{SPEC}test_the_least_configuration_is_enough",
        f"{UNIT_REQUEST}test_capabilities_that_nobody_would_serve_are_refused",
    ),
    delegated(_DELEGATION, "The IPAM plugin must determine addresses and return them to the main plugin"),
    delegated(_DELEGATION, "The delegated plugin must receive the same environment variables"),
    delegated(_DELEGATION, "On CHECK or DEL a plugin must also execute any delegated plugins"),
    plugin(
        _SUCCESS,
        "Plugins given a prevResult must output it as their result, with their modifications included",
        f"{AGENT}test_a_chain_keeps_the_earlier_result",
        f"{SPEC}test_another_plugin_in_front_of_ours",
    ),
    plugin(
        _SUCCESS,
        "A plugin that makes no changes must output a result equivalent to prevResult",
        f"{UNIT_RESULT}test_a_result_read_again_is_the_same",
    ),
    plugin(
        _SUCCESS,
        "Plugins must output an object with these keys upon ADD",
        f"{AGENT}test_add_in_every_version",
        f"{UNIT_RESULT}test_every_version_is_written_as_the_specification_says",
    ),
    delegated(_SUCCESS, "Delegated IPAM plugins must return an abbreviated Success object"),
    plugin(
        _ERROR,
        "Code 2: the message must contain the key and value of the unsupported field",
        f"{UNIT_REQUEST}test_an_unknown_key_is_refused_with_key_value_and_the_nearest_known_one",
        f"{BAD}test_network_configuration",
    ),
    plugin(
        _ERROR,
        "Code 4: the message must contain the names of invalid variables",
        f"{EXECUTABLE}test_every_missing_variable_is_named",
        f"{EXECUTABLE}test_invalid_variables_are_named",
    ),
    plugin(
        _VERSION,
        "Plugins must output an object with these keys upon VERSION",
        f"{EXECUTABLE}test_version_needs_neither_agent_nor_input",
        f"{EXECUTABLE}test_version_echoes_the_version_on_input",
        f"{AGENT}test_status_and_version",
    ),
)

RULES = _OF_1 + OF_0
